"""Marks on options, as metadata of their types: what a value means for the result."""

from dataclasses import dataclass

from pydantic import BaseModel


@dataclass(frozen=True)
class NamesFiles:
    """Marks an option that names local files, or may: `Annotated[str | None, NamesFiles()]`.

    What the files hold belongs to the settings then, as that of models, adapters and data sets does.
    """


@dataclass(frozen=True)
class WithoutEffect:
    """Marks an option that changes where, how fast or how loudly a stage works, and no result.

    A float's last bits may depend on the device and the batch; that is not what settings are about.
    """


def without_effect(config: type[BaseModel]) -> set[str]:
    """Names of the options so marked."""
    return {
        name
        for name, field in config.model_fields.items()
        if any(isinstance(mark, WithoutEffect) for mark in field.metadata)
    }


@dataclass(frozen=True)
class UnlessDefault:
    """Marks an option that settings record only where it is not at its default.

    An option that came later: artefacts from before it are those of its default.
    """


def at_default(config: BaseModel) -> set[str]:
    """Names of the options so marked that are at their defaults."""
    return {
        name
        for name, field in type(config).model_fields.items()
        if any(isinstance(mark, UnlessDefault) for mark in field.metadata)
        and getattr(config, name) == field.default
    }
