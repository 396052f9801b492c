"""Options of compress."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from emloc.machine.device import Device
from emloc.options.base import DEVICES, MemoryOptions, ModelOptions
from emloc.options.data import CalibrationOptions
from emloc.options.marks import UnlessDefault, WithoutEffect
from emloc.options.types import CountMap, Dtype, Located, Names, OutputDir, RatioMap

AUTO = "auto"
"""The name for a choice among formats: each layer gets the form that lowers the error most for its bytes."""

LOW_RANK_FORMAT = "low_rank"
"""The format of two factors, and of a group whose entry in a config or a manifest names none."""

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale."""

FACTOR_BITS = (4, 8, 16)
"""Bits that a number of a factor may have; 16 stands for the emulator's own dtype."""


SIZING = ("keep_ratio", "bits_per_weight", "bits")
"""Options that say how large an emulator becomes; where one is given, a plan chooses none of them."""

DEFAULT_BITS_PER_WEIGHT = 4.2
"""The budget of `format=auto` where none is given: about what QLoRA's NF4 takes."""

DEFAULT_KEEP_RATIO = 0.4
"""The budget of every other format where none is given."""


class CompressConfig(CalibrationOptions, ModelOptions, MemoryOptions):
    """Stage 1: write an emulator of a model."""

    model_name_or_path: Located = Field(
        description="local folder, single file or hub id of the base model"
    )
    output_dir: OutputDir = Field(description="where the emulator goes; must not exist")
    format: Annotated[str, UnlessDefault(formerly=LOW_RANK_FORMAT)] = Field(
        AUTO,
        description="format of compressed layers: an installed one, such as low_rank, or auto: chosen per "
        "layer",
    )
    keep_ratio: Annotated[float | None, UnlessDefault()] = Field(
        None,
        gt=0,
        le=1,
        description="share of each layer's bytes to keep; by default what memory allows, if given, else "
        f"{DEFAULT_BITS_PER_WEIGHT} bits per weight, or {DEFAULT_KEEP_RATIO} with a format other than auto",
    )
    bits: Annotated[Literal[1, 2, 3, 4, 8] | None, UnlessDefault()] = Field(
        None,
        description="bits per code: 1 to 4 with format=trellis; 2, 3, 4 or 8 with format=quantized; by "
        "default the most that keep_ratio allows",
    )
    group_size: Annotated[Literal[32, 64, 128] | None, UnlessDefault()] = Field(
        None, description="inputs that share a scale in format=trellis and format=quantized"
    )
    bits_per_weight: Annotated[float | None, UnlessDefault()] = Field(
        None,
        gt=0,
        le=64,
        description="budget in place of keep_ratio: bits per weight of each layer",
    )
    residual_rank: Annotated[int | None, UnlessDefault()] = Field(
        None,
        ge=0,
        le=1024,
        description="rank of the residual that format=trellis or quantized adds to its codes",
    )
    factor_bits: Annotated[Literal[4, 8, 16] | None, UnlessDefault()] = Field(
        None,
        description="bits per number in the factors of low_rank or of the residual; 16: the emulator's dtype",
    )
    embedding_bits: Annotated[Literal[4, 8] | None, UnlessDefault()] = Field(
        None,
        description="bits per number in input embeddings and output head; by default they stay as they are",
    )
    keep_ratio_pattern: RatioMap = Field({}, description="regular expression=ratio, per layer")
    rank_pattern: CountMap = Field({}, description="regular expression=rank, per layer")
    keep_ratio_allocation: Literal["uniform", "error"] = Field(
        "uniform",
        description="uniform: the same ratio for all layers; error: larger where that lowers the error most",
    )
    propagate_errors: Annotated[bool, UnlessDefault()] = Field(
        False,
        description="make up for errors of earlier layers: fit each layer to its inputs in the emulator",
    )
    weigh_errors: Annotated[Literal["alike", "gradients"], UnlessDefault()] = Field(
        "alike",
        description="gradients: weigh output errors by their effect on the loss (in auto's choice and in "
        "factors); one more pass",
    )
    share_factors: bool = Field(
        True, description="share one right factor among layers with the same input"
    )
    exclude: Names = Field([], description="regular expressions for layers to keep dense")
    include: Names = Field(
        [],
        description="regular expressions for layers to compress although they stay dense by default",
    )
    dtype: Dtype = Field("auto", description="dtype of the emulator's weights; auto: the base's")
    device: Annotated[Device, WithoutEffect()] = Field(
        "auto", validate_default=True, description=DEVICES
    )


ConfigT = TypeVar("ConfigT", bound=CompressConfig)


def with_size(config: ConfigT) -> ConfigT:
    """The options with the default budget spelt out, where they have none."""
    if any(getattr(config, name) is not None for name in SIZING):
        return config
    return config.model_copy(update=default_size(config.format))


def default_size(format: str) -> dict[str, Any]:
    """The default budget of a format, as an option."""
    if format == AUTO:
        return {"bits_per_weight": DEFAULT_BITS_PER_WEIGHT}
    return {"keep_ratio": DEFAULT_KEEP_RATIO}


def sized_by(config: CompressConfig) -> str:
    """The option that sizes an emulator, with its value: `keep_ratio 0.4`, `bits_per_weight 3.2`."""
    sized = with_size(config)
    given = [name for name in SIZING if getattr(sized, name) is not None]
    return f"{given[-1]} {getattr(sized, given[-1]):g}"
