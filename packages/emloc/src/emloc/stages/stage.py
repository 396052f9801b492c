"""A stage is one function of one options model: call it with keywords, or from the command line.

`@stage(Config)` turns `def compress(config: CompressConfig)` into a function whose keywords are the
config's fields, so Python, YAML and the command line can never disagree on names. What else it declares says
where it belongs: from the kinds of artefact that it takes and makes follow its place in a run and what it is
fed with there, from the planner's lines that describe it the memory that it is planned and held to.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.kinds import BASE, Kind
from emloc.config import build
from emloc.extend.family import ModelFamily
from emloc.extend.plugin_options import with_plugin_options
from emloc.machine.memory import return_large_blocks
from emloc.planning.contract import Contract, contract_for
from emloc.planning.setting import Planned
from emloc.stages.boundary import boundary

ConfigT = TypeVar("ConfigT", bound=BaseModel)
ResultT = TypeVar("ResultT")

Takes = Mapping[str, Kind | Sequence[Kind]]
"""The kind of artefact that each option names; of several, the first that a run has is preferred."""


@dataclass(frozen=True)
class Declared(Generic[ConfigT]):
    """A stage's declaration: the arguments of `stage`, where they are explained."""

    check: Callable[[ConfigT], object] | None = None
    suits: Callable[[ConfigT, Checkpoint, ModelFamily], object] | None = None
    consumes: Takes = field(default_factory=dict[str, Kind])
    produces: Kind | None = None
    folder: str = ""
    memory: Planned | None = None
    instead: Mapping[str, str] = field(default_factory=dict[str, str])


class Stage(Generic[ConfigT, ResultT]):
    """A callable with keyword options; `own_config` is its options model, without what plugins add to it."""

    def __init__(
        self,
        config: type[ConfigT],
        function: Callable[[ConfigT], ResultT],
        declared: Declared[ConfigT],
    ) -> None:
        self.own_config = config
        self._declared = declared
        self.function = function
        self.name = function.__name__
        self.produces, self.memory = declared.produces, declared.memory
        self.folder = declared.folder or self.name
        self.instead = declared.instead
        self.consumes: Mapping[str, Sequence[Kind]] = {
            option: (kinds,) if isinstance(kinds, Kind) else tuple(kinds)
            for option, kinds in declared.consumes.items()
        }
        self.__name__ = function.__name__
        self.__module__ = function.__module__
        self._refuse_backwards()

    @property
    def __doc__(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The function's own, and its options with those that the installed plugins add."""
        return f"{self.function.__doc__}\n\n    Options:\n" + "\n".join(
            f"        {name}: {field.description or 'as its name says'}{_default(field)}"
            for name, field in self.fields.items()
        )

    @property
    def fields(self) -> Mapping[str, FieldInfo]:
        """The options: the stage's own, then those that the installed plugins add."""
        return {name: self.config.model_fields[name] for name in self.own_config.model_fields} | (
            self.config.model_fields
        )

    @property
    def config(self) -> type[ConfigT]:
        """The options model, with what the installed plugins add to it."""
        return with_plugin_options(self.own_config)

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
                for name, field in self.fields.items()
            ]
        )

    def __call__(self, **options: Any) -> ResultT:
        """Validate the options and run the stage.

        Raises:
            EmlocError: whatever went wrong; what nobody foresaw is the cause of an `UnexpectedError`.
        """
        with boundary(self.name):
            return_large_blocks()
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
        if self._declared.check is not None:
            self._declared.check(config)
        return config

    def require_suited(self, config: ConfigT, model: Checkpoint, family: ModelFamily) -> None:
        """Refuse options that the model cannot do.

        Raises:
            EmlocError: as the stage's `suits` says.
        """
        if self._declared.suits is not None:
            self._declared.suits(config, model, family)

    def contract(
        self,
        config: Any,
        model: Checkpoint,
        family: ModelFamily,
        adapter: Adapter | None = None,
    ) -> Contract | None:
        """The stage's planned memory, where its options give any.

        Args:
            config: the stage's options, with `memory` and `output_dir`.
            model: what the stage opens: a base, an emulator.
            adapter: that is there already, where the stage takes one.

        Raises:
            MemoryLimitError: the stage cannot fit.
        """
        if self.memory is None or config.memory is None:
            return None
        return contract_for(self.name, self.memory, config, model, family, adapter)

    @property
    def repairs(self) -> bool:
        """Return whether it makes the kind of artefact that it takes."""
        return any(self.produces in kinds for kinds in self.consumes.values())

    @property
    def place(self) -> tuple[int, bool, str]:
        """Key by which stages are in order: by what they make, those that repair after those that make anew.

        Of stages that make nothing, those that take no more than a base model come first, those that take
        what others make after all of these, and those that take nothing at the end.
        """
        if self.produces is not None:
            return self.produces.order, self.repairs, self.name
        taken = [kind.order for kinds in self.consumes.values() for kind in kinds]
        made = any(order > BASE.order for order in taken)
        order = LAST if made else BASE.order if taken else LAST + 1
        return order, False, self.name

    def _refuse_backwards(self) -> None:
        """A stage that makes a kind before one that it takes would have no place: ValueError."""
        for option, kinds in self.consumes.items():
            for kind in kinds:
                if self.produces is not None and kind.order > self.produces.order:
                    raise ValueError(
                        f"stage {self.name} takes {kind} as {option} and makes {self.produces}, which comes "
                        f"before it"
                    )


LAST = 1 << 16


def _default(field: FieldInfo) -> str:
    return "" if field.is_required() else f" (default: {field.get_default()!r})"


def stage(
    config: type[ConfigT],
    check: Callable[[ConfigT], object] | None = None,
    suits: Callable[[ConfigT, Checkpoint, ModelFamily], object] | None = None,
    consumes: Takes | None = None,
    produces: Kind | None = None,
    folder: str = "",
    memory: Planned | None = None,
    instead: Mapping[str, str] | None = None,
) -> Callable[[Callable[[ConfigT], ResultT]], Stage[ConfigT, ResultT]]:
    """Decorate a function of `config` to become a `Stage`.

    Args:
        check: refuses options that cannot work; asked before the stage begins, and by a run of several stages
            before the first of them does.
        suits: refuses options that the model cannot do; asked by a run that can open the model.
        consumes: by option the kind of artefact that it names, or several kinds of which the first is
            preferred. A run gives the option the artefact of the last stage before it that makes the kind.
        produces: the kind that it makes in `output_dir`; without one it is no part of a run.
        folder: what `output_dir` is called under a run's; by default as the stage.
        memory: what it takes, for the planner: one of its own (`Setting.train`), or a function of a setting.
            Its options have `memory` then, `emloc plan` shows it, and a run is fitted to a budget with it.
            None: it is not planned.
        instead: by option the one that takes its place: where that is given, the former is not taken from the
            top of a run's file.
    """
    declared = Declared(check, suits, consumes or {}, produces, folder, memory, instead or {})

    def wrap(function: Callable[[ConfigT], ResultT]) -> Stage[ConfigT, ResultT]:
        return Stage(config, function, declared)

    return wrap
