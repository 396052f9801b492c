"""A model as training has it, without its weights: what a step on fake tensors is run on."""

from collections.abc import Container
from typing import Any

from peft import get_peft_model
from torch import nn

from emloc.config import TrainConfig
from emloc.integrations.peft.fused_lora import fuse_lora
from emloc.integrations.peft.lora import lora_config


def with_planned_lora(
    model: nn.Module,
    config: TrainConfig,
    excluded: Container[str] = (),
    task_type: str | None = None,
) -> nn.Module:
    """The model on the meta device with its LoRA, fused where training fuses it, in training mode."""
    made: Any = get_peft_model(
        model,  # pyright: ignore[reportArgumentType]
        lora_config(config, model, excluded, task_type),
        low_cpu_mem_usage=True,
    )
    fuse_lora(made)
    return made.train()
