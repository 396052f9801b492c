"""Options of evaluate."""

from typing import Annotated

from pydantic import Field

from emloc.machine.device import Device
from emloc.options.base import DEVICES, ModelOptions
from emloc.options.data import DataOptions
from emloc.options.marks import WithoutEffect
from emloc.options.types import Dtype, Located, OutputDir


class EvaluateConfig(DataOptions, ModelOptions):
    """Loss and exact match of a model, with or without an adapter."""

    model_name_or_path: Located = Field(description="model or emulator")
    adapter: Located | None = Field(None, description="PEFT adapter to load onto it")
    allow_mismatch: Annotated[bool, WithoutEffect()] = Field(
        False,
        description="score an adapter on a model that it was not made for, such as an uncorrected one on "
        "the original",
    )
    output_dir: OutputDir | None = Field(None, description="folder for evaluation.json")
    num_samples: int | None = Field(
        None, ge=1, description="number of samples to score, from the first; by default all"
    )
    per_device_eval_batch_size: int = Field(16, ge=1)
    dtype: Dtype = Field("auto", description="auto: as stored")
    device: Annotated[Device, WithoutEffect()] = Field(
        "auto", validate_default=True, description=DEVICES
    )
