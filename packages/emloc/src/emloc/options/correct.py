"""Options of correct."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from emloc.machine.device import Device
from emloc.options.base import DEVICES, MemoryOptions, ModelOptions
from emloc.options.data import CalibrationOptions
from emloc.options.few_bits import FewBitsOptions
from emloc.options.marks import UnlessDefault, WithoutEffect
from emloc.options.types import GivenLimit, Limit, Located, OutputDir, split

Share = Annotated[float, Field(gt=0, le=1)]


class CorrectConfig(FewBitsOptions, CalibrationOptions, ModelOptions, MemoryOptions):
    """Stage 3: fit the LoRA to the original model."""

    adapter: Located = Field(description="PEFT adapter trained on the emulator, or by QLoRA")
    emulator: Located | None = Field(
        None,
        description="the emulator it was trained on; none: the base in few bits (bitsandbytes)",
    )
    output_dir: OutputDir = Field(description="where the corrected adapter goes; must not exist")
    model_name_or_path: Located | None = Field(
        None,
        description="the base model; by default the one that the emulator or the adapter names",
    )
    num_calibration_samples: int = Field(32, ge=1, description="samples to draw, by seed")
    limit: Limit = Field(
        "auto",
        description="largest correction per direction, relative to the LoRA; none; auto; dequantised",
    )
    limit_candidates: Annotated[list[GivenLimit], BeforeValidator(split)] = Field(
        [0.0, 0.3, 1.0, 3.0, "none"],
        description="limits that auto tries; 0: no correction; dequantised: the base as it was in few bits",
    )
    strength: Annotated[float | None, UnlessDefault()] = Field(
        None,
        gt=0,
        le=1,
        description="share of the correction fitted to the data, in place of a limit",
    )
    strength_candidates: Annotated[list[Share], BeforeValidator(split), UnlessDefault()] = Field(
        [0.25, 0.5, 0.75, 1.0], description="strengths that limit=auto also tries"
    )
    device: Annotated[Device, WithoutEffect()] = Field(
        "auto", validate_default=True, description=DEVICES
    )
