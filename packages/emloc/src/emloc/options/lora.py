"""Options of a LoRA."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from emloc.options.base import StageConfig
from emloc.options.types import CountMap, Names, split


class LoraOptions(StageConfig):
    """PEFT's LoRA options under the names that people know."""

    lora_r: int = Field(16, ge=1, description="rank")
    lora_alpha: float = Field(
        32, gt=0, allow_inf_nan=False, description="alpha; scaling is alpha / r"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target_modules: Names = Field(
        ["all-linear"], description="module names, or all-linear (except the head)"
    )
    lora_rank_pattern: CountMap = Field({}, description="regular expression=rank")
    lora_alpha_pattern: CountMap = Field({}, description="regular expression=alpha")
    use_rslora: bool = Field(False, description="scaling is alpha / sqrt(r)")
    use_dora: bool = Field(False, description="weight-decomposed LoRA")
    lora_init: Literal["default", "gaussian", "pissa", "olora", "eva"] = Field(
        "default", description="how A and B are initialised"
    )
    lora_layers_to_transform: Annotated[
        list[Annotated[int, Field(ge=0)]], BeforeValidator(split)
    ] = Field([], description="numbers of the blocks to adapt; by default all")
    lora_layers_pattern: Names = Field(
        [], description="names of the stacks whose blocks are numbered, if there are several"
    )
    lora_modules_to_save: Names = Field([], description="modules trained whole, such as lm_head")
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: ratio of B's learning rate to A's"
    )
