"""Options that plugins add: each must be able to stand beside a stage's own and those of other families.

All of them are options of one command, so one name has one type. Two families may share a name: each has its
own default and meaning for it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from emloc import config
from emloc.errors import PluginError
from emloc.extend.family import FamilyEntry
from emloc.options.marks import Mark

STAGES: Sequence[type[BaseModel]] = (
    config.CompressConfig,
    config.TrainConfig,
    config.CorrectConfig,
    config.PolishConfig,
    config.MergeConfig,
    config.EvaluateConfig,
    config.VerifyConfig,
    config.PlanConfig,
    config.DemoConfig,
)


def check_options(added: Sequence[FamilyEntry], others: Iterable[FamilyEntry]) -> None:
    """Refuse options of new families that cannot stand beside what is there.

    Raises:
        PluginError: an option is a stage's own already, has no default, or is of another type in another
            family.
    """
    known = list(others)
    for entry in added:
        for stage in STAGES:
            there = [(other, *option) for other in known for option in _options(other, stage)]
            for name, field in _options(entry, stage):
                _check(entry, stage, name, field)
                for other, taken, theirs in there:
                    if name == taken and _type(field) != _type(theirs):
                        raise PluginError(
                            f"its option {name} for {_called(stage)} differs in type from that of the "
                            f"family {other.name} ({_said(field)}, and {_said(theirs)} there)"
                        )
        known.append(entry)


def check_stage(name: str, stage: type[BaseModel], families: Iterable[FamilyEntry]) -> None:
    """Refuse a plugin's stage that the options of families cannot stand beside.

    Args:
        stage: its own options.

    Raises:
        PluginError: a family adds an option that the stage has already, or two add one of different types.
    """
    added: dict[str, tuple[str, FieldInfo]] = {}
    for entry in families:
        for option, field in _options(entry, stage):
            if option in stage.model_fields:
                raise PluginError(
                    f"its stage {name} has the option {option}, which the family {entry.name} adds to it; "
                    f"rename one of them"
                )
            other, theirs = added.setdefault(option, (entry.name, field))
            if _type(field) != _type(theirs):
                raise PluginError(
                    f"its stage {name} gets the option {option} twice, of different types: from the family "
                    f"{other} ({_said(theirs)}) and from {entry.name} ({_said(field)})"
                )


def _check(entry: FamilyEntry, stage: type[BaseModel], name: str, field: FieldInfo) -> None:
    if name in stage.model_fields:
        raise PluginError(f"its option {name} is already an option of {_called(stage)}")
    if field.is_required():
        raise PluginError(
            f"its option {name} for {_called(stage)} has no default, so other families could not do "
            f"without it"
        )


def _options(entry: FamilyEntry, stage: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    for base, fields in entry.options_for(stage):
        if issubclass(fields, base):
            raise PluginError(
                f"its options {fields.__name__} derive from {base.__name__}, which they are added to; "
                f"derive them from emloc.config.StageConfig"
            )
        yield from fields.model_fields.items()


def _type(field: FieldInfo) -> tuple[Any, list[str]]:
    return field.annotation, [repr(part) for part in _limits(field)]


def _limits(field: FieldInfo) -> list[Any]:
    """The limits of its values; each family's own marks say what becomes of them."""
    return [part for part in field.metadata if not isinstance(part, Mark)]


def _said(field: FieldInfo) -> str:
    kind = getattr(field.annotation, "__name__", None) or str(field.annotation)
    limits = ", ".join(map(repr, _limits(field)))
    return f"{kind} with {limits}" if limits else kind


def _called(stage: type[BaseModel]) -> str:
    return stage.__name__.removesuffix("Config").lower()
