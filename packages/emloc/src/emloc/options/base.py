"""Options that most stages share: the model's files, the memory that may be taken, the device."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from emloc.options.amounts import Bytes
from emloc.options.marks import WithoutEffect
from emloc.options.types import Located

DEVICES = "cpu, cuda, cuda:1; auto: cuda where there is one"


class StageConfig(BaseModel):
    """Base of all stage options: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelOptions(StageConfig):
    """Options for reading a model's files."""

    family: Annotated[str | None, WithoutEffect()] = Field(
        None,
        description="whose model it is, where several installed families recognise it",
    )
    single_file_config: Located | None = Field(
        None,
        description="of a model in one file: a folder or hub id with its configuration; by default a guess",
    )


class MemoryOptions(StageConfig):
    """Options for the memory that a stage may take."""

    memory: Annotated[Bytes | None, WithoutEffect()] = Field(
        None,
        description="what the device has for it, such as 24GiB: planned before, and held to it",
    )
