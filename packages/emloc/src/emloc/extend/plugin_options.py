"""Options of stages that only one family has, such as how images are cut up.

A plugin gives them as fields of pydantic models, and a stage takes them like its own. Two families may have
an option of one name, of the same type: the model's family decides what it means, and its default. What
belongs to other families alone is refused if it was set, and is no part of what shaped a result.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import BaseModel, create_model

from emloc.errors import ConfigError
from emloc.extend.family import ModelFamily
from emloc.extend.plugins import load_plugins
from emloc.options.marks import at_default, without_effect

ConfigT = TypeVar("ConfigT", bound=BaseModel)


@cache
def with_plugin_options(config: type[ConfigT]) -> type[ConfigT]:
    """A stage's options and those that the installed plugins add to it."""
    return _with(config, [fields for parts in _by_family(config).values() for fields in parts])


def with_family_options(config: type[ConfigT], family: ModelFamily) -> type[ConfigT]:
    """A stage's options and those that one family adds to it."""
    kind = _stage_options(config)
    return cast(type[ConfigT], _with(kind, _by_family(kind).get(family.name, [])))


def of_family(config: ConfigT, family: ModelFamily) -> ConfigT:
    """The options as the model's family has them, without those of other families.

    Raises:
        ConfigError: an option of other families alone was set.
    """
    kind = type(config)
    own = _by_family(kind).get(family.name, [])
    mine = {name for fields in own for name in fields.model_fields}
    added: dict[str, list[str]] = {}
    for other, parts in _by_family(kind).items():
        for name in {name for fields in parts for name in fields.model_fields}:
            added.setdefault(name, []).append(other)
    foreign = added.keys() - mine
    for name in sorted(config.model_fields_set & foreign):
        if getattr(config, name) == kind.model_fields[name].get_default(call_default_factory=True):
            continue  # settings that several models share may spell out a default
        families = " and ".join(added[name])
        raise ConfigError(
            f"{name} is an option of the family {families}, but the model is of {family.name}; leave it out."
        )
    if not added:
        return config
    asked = {name: getattr(config, name) for name in config.model_fields_set - foreign}
    return with_family_options(kind, family)(**asked)


def own_options(config: BaseModel, exclude: set[str]) -> dict[str, Any]:
    """The options of `of_family` that shape a result, as JSON."""
    left_out = exclude | without_effect(type(config)) | at_default(config)
    return config.model_dump(mode="json", exclude=left_out)


def forget_plugin_options() -> None:
    """Have options found out anew, after plugins have come or gone."""
    with_plugin_options.cache_clear()
    _by_family.cache_clear()


def _with(config: type[ConfigT], parts: Sequence[type[BaseModel]]) -> type[ConfigT]:
    if not parts:
        return config
    unique = tuple(dict.fromkeys(parts))
    made = create_model(
        config.__name__, __base__=(config, *unique), __doc__=config.__doc__, __module__=__name__
    )
    return cast(type[ConfigT], made)


def _stage_options(kind: type[BaseModel]) -> type[BaseModel]:
    """The model that plugins' options were added to here, or this one where none were."""
    return next(base for base in kind.__mro__ if base.__module__ != __name__)


@cache
def _by_family(config: type[BaseModel]) -> dict[str, list[type[BaseModel]]]:
    return {
        entry.name: [fields for _, fields in entry.options_for(config)]
        for entry in load_plugins().families.values()
    }
