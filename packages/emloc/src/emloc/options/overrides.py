"""`key=value` and `stage.key=value`, as they stand on a command line beside a file."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from emloc.errors import ConfigError
from emloc.options.build import nearest
from emloc.options.yaml_file import parse_value


class Overrides(NamedTuple):
    """The given options; of equal keys the last.

    Attributes:
        everywhere: for every stage that takes the option.
        by_stage: for one stage.
    """

    everywhere: dict[str, Any]
    by_stage: dict[str, dict[str, Any]]


def read_overrides(texts: Sequence[str], stages: list[str]) -> Overrides:
    """Parse overrides; values are read as in a YAML file (`parse_value`).

    Raises:
        ConfigError: one is none, or names no stage.
    """
    overrides = Overrides({}, {})
    for text in texts:
        path, equals, value = text.partition("=")
        stage, dot, key = path.rpartition(".")
        if not equals or not key.isidentifier():
            raise ConfigError(f"Override {text!r} should read key=value or stage.key=value.")
        if dot and stage not in stages:
            raise ConfigError(f"Override {text!r}: no stage {stage}.{nearest(stage, stages)}")
        parsed = parse_value(value)
        if dot or key not in stages:
            target = overrides.by_stage.setdefault(stage, {}) if dot else overrides.everywhere
            target[key] = parsed
        elif not parsed or isinstance(parsed, dict):  # `merge=` or `merge={}`: that stage as well
            overrides.by_stage.setdefault(key, {}).update(cast("dict[str, Any]", parsed or {}))
        else:
            raise ConfigError(f"Override {text!r}: {key} is a stage; write {key}.option=value.")
    return overrides
