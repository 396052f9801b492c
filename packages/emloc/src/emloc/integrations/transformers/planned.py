"""What the planner needs of a model of transformers, whatever it reads (`PlannedFamily`)."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import TrainConfig
from emloc.integrations.peft.targets import chosen_targets, linear_layers
from emloc.integrations.transformers.skeleton import empty_model, is_linear
from emloc.planning.described import weight_dtype
from emloc.planning.family import Groups, OtherModel


def adapted_layers(
    model: nn.Module, options: TrainConfig, excluded: Container[str] = ()
) -> Sequence[str]:
    """Layers that a LoRA goes on; fused experts that PEFT leaves out are not known here."""
    targets = set(chosen_targets(options, model, excluded, linear_layers))
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and not targets.isdisjoint(_endings(name))
    ]


def _endings(name: str) -> list[str]:
    """What a target may say to mean this module."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def emulator_skeleton(
    checkpoint: Checkpoint, auto_class: Any, groups: Groups, dtype: str
) -> nn.Module:
    """The model on the meta device with factors for `groups`."""
    from emloc.integrations.transformers.quantizer import replace_layers

    kind = weight_dtype(checkpoint, 0) if dtype == "auto" else getattr(torch, dtype)
    model = empty_model(checkpoint, auto_class, kind)
    replace_layers(model, [{"layers": list(names), "rank": rank} for names, rank in groups])
    return model.requires_grad_(False)


def run_blocks_twice(model: Any) -> None:
    """Gradient checkpointing, as the Trainer turns it on."""
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()


class PlannedTransformer:
    """What is the same of `PlannedFamily` for all models of transformers."""

    def cache_elements(self, model: nn.Module, options: Any) -> int:
        """Keys and values of `max_length` tokens in every block of the language model."""
        whole: Any = model.config
        config = whole.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return 2 * config.num_hidden_layers * heads * head * options.max_length

    def other_models(self, checkpoint: Checkpoint, options: Any) -> Mapping[str, OtherModel]:
        """None: a vision tower is part of the model."""
        return {}
