"""Options that most stages share: the model's files, the memory that may be taken, the device."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from emloc.options.amounts import Bytes
from emloc.options.marks import NamesData, NamesFiles, WithoutEffect
from emloc.options.types import Located, refuse_long

MOST_NAMES = 1000
"""Files and folders of data that one option may name."""

LARGEST_NUMBER = (1 << 63) - 1

DEVICES = "cpu, cuda, cuda:1; auto: cuda if available"


class StageConfig(BaseModel):
    """Base of all stage options: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _names_that_disks_have(cls, value: Any, field: ValidationInfo) -> Any:
        marks = cls.model_fields[str(field.field_name)].metadata
        several = any(isinstance(mark, (NamesData, NamesFiles)) for mark in marks)
        if several or isinstance(value, Path):
            names = cast("list[Any]", value) if isinstance(value, list) else [value]
            if several and isinstance(value, str):
                names = value.split(",")
            if len(names) > MOST_NAMES:
                raise ValueError(
                    f"it names {len(names):,} files; at most {MOST_NAMES:,} are allowed"
                )
            for name in names:
                refuse_long(str(name))
        return value

    @field_validator("*")
    @classmethod
    def _numbers_of_64_bits(cls, value: Any) -> Any:
        """A larger one is a slip, and fails somewhere inside of a library."""
        inside: Any = value.values() if isinstance(value, dict) else value
        several = isinstance(value, (list, tuple, dict))
        for one in cast("Iterable[Any]", inside) if several else [value]:
            if isinstance(one, int) and abs(one) > LARGEST_NUMBER:
                raise ValueError(f"it is larger than {LARGEST_NUMBER:,}")
        return value


class ModelOptions(StageConfig):
    """Options for reading a model's files."""

    family: Annotated[str | None, WithoutEffect()] = Field(
        None,
        description="family that the model belongs to, if several installed ones recognise it",
    )
    single_file_config: Located | None = Field(
        None,
        description="folder or hub id with the configuration of a single-file model; by default a guess",
    )


class MemoryOptions(StageConfig):
    """Options for the memory that a stage may take."""

    memory: Annotated[Bytes | None, WithoutEffect()] = Field(
        None,
        description="memory that the stage may use, such as 24GiB: planned beforehand and enforced",
    )
