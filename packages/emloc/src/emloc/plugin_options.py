"""Options of stages that only one family has, such as how images are cut up.

A plugin gives them as fields of pydantic models, and a stage takes them like its own. What belongs to
another family than the model's is refused if it was set, and is no part of what shaped a result.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import BaseModel, create_model

from emloc.errors import ConfigError
from emloc.family import ModelFamily
from emloc.plugins import load_plugins

ConfigT = TypeVar("ConfigT", bound=BaseModel)

WITHOUT_EFFECT = {"memory"}
"""Of every stage: what it may take shapes nothing."""


@cache
def with_plugin_options(config: type[ConfigT]) -> type[ConfigT]:
    """A stage's options and those that the installed plugins add to it."""
    own = [fields for parts in _by_family(config).values() for fields in parts]
    if not own:
        return config
    made = create_model(config.__name__, __base__=(config, *own), __doc__=config.__doc__)
    return cast(type[ConfigT], made)


def own_options(config: BaseModel, family: ModelFamily, exclude: set[str]) -> dict[str, Any]:
    """The options as JSON, those of other families left out.

    Raises:
        ConfigError: an option of another family was set.
    """
    foreign: Mapping[str, str] = {
        name: other
        for other, parts in _by_family(type(config)).items()
        if other != family.name
        for fields in parts
        for name in fields.model_fields
    }
    for name in sorted(config.model_fields_set & foreign.keys()):
        raise ConfigError(
            f"{name} is an option of the family {foreign[name]}, and the model is of {family.name}; "
            f"leave it out."
        )
    return config.model_dump(mode="json", exclude=exclude | WITHOUT_EFFECT | foreign.keys())


@cache
def _by_family(config: type[BaseModel]) -> dict[str, list[type[BaseModel]]]:
    return {
        entry.name: [fields for base, fields in entry.options.items() if issubclass(config, base)]
        for entry in load_plugins().families.values()
    }
