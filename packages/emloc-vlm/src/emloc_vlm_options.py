"""Options of the stages that only vision-language models have; imports nothing heavy."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from emloc.plugin import OfNewLora, StageConfig


class ImageOptions(StageConfig):
    """Options for finding images and cutting them up."""

    image_folder: Path | None = Field(
        None, description="folder that image paths are relative to; by default the data set's"
    )
    on_bad_image: Literal["stop", "skip"] = Field(
        "stop", description="for a missing or unreadable image: stop, or skip and count"
    )
    max_dynamic_patch: int | None = Field(
        None, ge=1, description="maximum tiles per image; by default the processor's"
    )


class FreezeOptions(StageConfig):
    """Options for the parts that the LoRA leaves alone."""

    freeze_vision_tower: Annotated[bool, OfNewLora()] = Field(
        True, description="no LoRA on the vision tower"
    )
    freeze_multi_modal_projector: Annotated[bool, OfNewLora()] = Field(
        True, description="no LoRA on the projector"
    )
    freeze_language_model: Annotated[bool, OfNewLora()] = Field(
        False, description="no LoRA on the language model"
    )


class MetricOptions(StageConfig):
    """Options for scoring answers about images."""

    metric: Literal[
        "auto",
        "exact_match",
        "vqa_accuracy",
        "multiple_choice",
        "websrc",
        "worldcuisines",
        "vqa_rad",
    ] = Field("auto", description="auto: the metric of the data set's format, else exact_match")
