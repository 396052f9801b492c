"""Marks on options, as metadata of their types: what a value means, and what stages make of it.

Stages and the planner go by marks where an option is a family's own, whose name they do not know.
"""

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel


class Mark:
    """Base of all marks."""


MarkT = TypeVar("MarkT", bound=Mark)


def marked(config: type[BaseModel], kind: type[MarkT]) -> dict[str, MarkT]:
    """The mark of that kind of every option that has one, by the option's name."""
    return {
        name: mark
        for name, field in config.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, kind)
    }


@dataclass(frozen=True)
class NamesFiles(Mark):
    """Marks an option that names local files, or may: `Annotated[str | None, NamesFiles()]`.

    What the files hold belongs to the settings then, as that of models, adapters and data sets does.
    """


@dataclass(frozen=True)
class NamesData(Mark):
    """Marks an option that names data sets, in whose folders no result may lie.

    Attributes:
        digest: the key under which the settings of train and evaluate hold the data's digest, in place of
            the name; none where something else does.
    """

    digest: str = ""


@dataclass(frozen=True)
class SplitOf(Mark):
    """Marks an option that says which part of a data set is read.

    Attributes:
        option: the one that names the data set.
    """

    option: str


def split_of(config: BaseModel, option: str) -> str:
    """The part of an option's data set that is read; empty where no option says so."""
    for name, mark in marked(type(config), SplitOf).items():
        if mark.option == option:
            return getattr(config, name)
    return ""


@dataclass(frozen=True)
class InsteadOf(Mark):
    """Marks an option that, where it is given, makes another one unnecessary.

    Attributes:
        option: the other one.
    """

    option: str


@dataclass(frozen=True)
class SampleSize(Mark):
    """Marks an option that bounds the size of a sample, which fitting a budget may halve.

    Attributes:
        least: what it is not taken below.
    """

    least: int


@dataclass(frozen=True)
class OfNewLora(Mark):
    """Marks an option that shapes a new LoRA, so that it is refused where training goes on from one."""


@dataclass(frozen=True)
class LossAlone(Mark):
    """Marks an option of evaluate that has a value with which nothing but the loss is measured.

    Attributes:
        value: that value.
    """

    value: Any


def loss_alone(config: type[BaseModel]) -> dict[str, Any]:
    """The options with which evaluate measures the loss and nothing else."""
    return {name: mark.value for name, mark in marked(config, LossAlone).items()}


@dataclass(frozen=True)
class WithoutEffect(Mark):
    """Marks an option that changes where, how fast or how loudly a stage works, and no result.

    A float's last bits may depend on the device and the batch; that is not what settings are about.
    """


def without_effect(config: type[BaseModel]) -> set[str]:
    """Names of the options so marked."""
    return set(marked(config, WithoutEffect))


@dataclass(frozen=True)
class UnlessDefault(Mark):
    """Marks an option that settings record only where it is not at its default.

    An option that came later: artefacts from before it are those of its default.

    Attributes:
        formerly: the value that they are of, where the default has become another one.
    """

    formerly: Any = None


def at_default(config: BaseModel) -> set[str]:
    """Names of the options so marked that are at their defaults."""
    fields = type(config).model_fields
    return {
        name
        for name, mark in marked(type(config), UnlessDefault).items()
        if getattr(config, name)
        == (fields[name].default if mark.formerly is None else mark.formerly)
    }
