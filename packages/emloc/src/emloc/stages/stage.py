"""A stage is one function of one options model: call it with keywords, or from the command line.

`@stage(Config)` turns `def compress(config: CompressConfig)` into a function whose keywords are the
config's fields, so Python, YAML and the command line can never disagree on names. `check=` is asked before
the stage begins, and by a run of several stages before the first of them does.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from emloc.config import build
from emloc.extend.plugin_options import with_plugin_options

ConfigT = TypeVar("ConfigT", bound=BaseModel)
ResultT = TypeVar("ResultT")


class Stage(Generic[ConfigT, ResultT]):
    """A callable with keyword options; `config` is its options model."""

    def __init__(
        self,
        config: type[ConfigT],
        function: Callable[[ConfigT], ResultT],
        check: Callable[[ConfigT], object] | None = None,
    ) -> None:
        self._config = config
        self._check = check
        self.function = function
        self.name = function.__name__
        self.__name__ = function.__name__
        self.__doc__ = f"{function.__doc__}\n\n    Options:\n" + "\n".join(
            f"        {name}: {field.description or 'as its name says'}{_default(field)}"
            for name, field in config.model_fields.items()
        )

    @property
    def config(self) -> type[ConfigT]:
        """The options model, with what the installed plugins add to it."""
        return with_plugin_options(self._config)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.is_required() else field.get_default(),
                    annotation=field.annotation,
                )
                for name, field in self.config.model_fields.items()
            ]
        )

    def __call__(self, **options: Any) -> ResultT:
        """Validate the options and run the stage."""
        return self.function(self.checked(options, self.name))

    def checked(self, options: Mapping[str, Any], where: str) -> ConfigT:
        """The options, validated, with all that can be known before the stage begins.

        Args:
            where: names their origin in messages.

        Raises:
            ConfigError: an option is wrong.
            EmlocError: as the stage's check says, for example of a folder that cannot be written.
        """
        config = build(self.config, options, where)
        if self._check is not None:
            self._check(config)
        return config


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() else f" (default: {field.get_default()!r})"


def stage(
    config: type[ConfigT], check: Callable[[ConfigT], object] | None = None
) -> Callable[[Callable[[ConfigT], ResultT]], Stage[ConfigT, ResultT]]:
    """Decorate a function of `config` to become a `Stage`; `check` refuses what cannot work."""

    def wrap(function: Callable[[ConfigT], ResultT]) -> Stage[ConfigT, ResultT]:
        return Stage(config, function, check)

    return wrap
