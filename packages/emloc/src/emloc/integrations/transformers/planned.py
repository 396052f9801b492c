"""The planner's view of a model of transformers, whatever it reads (`PlannedFamily`)."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.compression.vocabulary import choose_tables
from emloc.config import TrainConfig
from emloc.extend.family import Batch
from emloc.formats.vocabulary import VocabularyTable
from emloc.integrations.peft.targets import chosen_targets, linear_layers
from emloc.integrations.transformers.capacity import capacity_of
from emloc.integrations.transformers.shallow import cut, depths, depths_of
from emloc.integrations.transformers.skeleton import empty_model, is_linear, model_config
from emloc.integrations.transformers.text_options import longest
from emloc.integrations.transformers.vocabulary import replace_tables
from emloc.planning.described import weight_dtype
from emloc.planning.family import Groups, OtherModel
from emloc.planning.operations import Layer
from emloc.planning.step import StepOptions, StepSizes

POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions")
"""Entries of configs that say how many positions a model has, or was trained for."""


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
    """The names by which a target may mean this module."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def emulator_skeleton(
    checkpoint: Checkpoint, auto_class: Any, groups: Groups, dtype: str
) -> nn.Module:
    """The model on the meta device with `groups` emulated."""
    from emloc.integrations.transformers.quantizer import replace_layers

    kind = weight_dtype(checkpoint, 0) if dtype == "auto" else getattr(torch, dtype)
    model = empty_model(checkpoint, auto_class, kind)
    replace_layers(model, [group.as_json() for group in groups])
    return model.requires_grad_(False)


def run_blocks_twice(model: Any) -> None:
    """Gradient checkpointing, as the Trainer turns it on; of a model that cannot, nothing."""
    if not model.supports_gradient_checkpointing:
        return
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()


class PlannedTransformer:
    """`PlannedFamily` for models of transformers, whatever they read; steps are traced.

    Attributes:
        auto_class: of transformers.
        task_type: PEFT's name of what the models are for, if it has one. With `SEQ_CLS` and `TOKEN_CLS`
            PEFT trains the modules `classifier` and `score` whole.
        towers: sub-configs that have stacks of blocks each; none: the config itself has one, or an encoder's
            and a decoder's.
    """

    auto_class: Any
    task_type: str | None = None
    towers: tuple[str, ...] = ()

    def example(self, config: Any, samples: int, length: int) -> Batch:
        """Zeros as the forward takes them, and labels, for models of a config of transformers.

        Args:
            length: tokens of each sample, where there are tokens.
        """
        raise NotImplementedError

    def frozen(self, model: nn.Module, options: Any) -> Container[str]:
        """Modules that no LoRA goes on, whatever targets say; by default none."""
        return ()

    def as_trained(self, model: nn.Module) -> nn.Module:
        """A model whose head is what the trainer makes of it; by default as it is."""
        return model

    def planned_batch(self, checkpoint: Checkpoint, options: Any, samples: int) -> Batch:
        """See `PlannedFamily`; an `example` on the meta device, no longer than the model has positions."""
        length = longest(options)
        said = (checkpoint.config.get(name) for name in POSITIONS)
        if any(isinstance(most, int) and most < length for most in said):
            positions = capacity_of(
                empty_model(checkpoint, self.auto_class, torch.float32)
            ).positions
            length = length if positions is None else min(length, positions)
        with torch.device("meta"):
            return self.example(model_config(checkpoint), samples, length)

    def adapted_layers(self, model: nn.Module, options: Any) -> Sequence[str]:
        """See `PlannedFamily`."""
        return adapted_layers(model, options, self.frozen(model, options))

    def stacks(self, checkpoint: Checkpoint) -> Sequence[int]:
        """See `PlannedFamily`; by `towers`."""
        return [count for part in self._parts(checkpoint.config) for count in depths(part)]

    def shallow(self, checkpoint: Checkpoint, blocks: Sequence[int]) -> Checkpoint:
        """See `PlannedFamily`."""
        assert isinstance(checkpoint, Described)
        config = checkpoint.config
        left = iter(blocks)
        parts = [cut(part, [next(left) for _ in depths(part)]) for part in self._parts(config)]
        if not self.towers:
            return checkpoint.having(parts[0])
        return checkpoint.having({**config, **dict(zip(self.towers, parts))})

    def _parts(self, config: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The configs that say how many blocks stacks have."""
        return [config[tower] for tower in self.towers] or [config]

    def trainable(self, checkpoint: Checkpoint, groups: Groups, options: Any) -> nn.Module:
        """See `PlannedFamily`."""
        from emloc.integrations.peft.planned import with_planned_lora

        model = emulator_skeleton(checkpoint, self.auto_class, groups, options.dtype)
        replace_tables(model, self._tables(checkpoint, options))
        model = self.as_trained(model)
        if options.gradient_checkpointing:
            run_blocks_twice(model)
        return with_planned_lora(model, options, self.frozen(model, options), self.task_type)

    def _tables(self, checkpoint: Checkpoint, options: Any) -> Sequence[VocabularyTable]:
        bits: int | None = getattr(options, "embedding_bits", None)
        family: Any = self  # a subclass is one
        skeleton = empty_model(checkpoint, self.auto_class, torch.float32)
        return choose_tables(family, skeleton, checkpoint.name, bits)

    def step_sizes(
        self, model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
    ) -> StepSizes | None:
        """See `PlannedFamily`; no closed form."""
        return None

    def cache_elements(self, model: nn.Module, options: Any) -> int:
        """Keys and values of the longest sample in every block of a model that writes text.

        In a decoder behind an encoder, also those of what the encoder wrote.
        """
        whole: Any = model
        if not whole.can_generate():
            return 0
        config = whole.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        blocks, length = depths_of(config)[-1], longest(options)
        if getattr(config, "is_encoder_decoder", False):
            length += getattr(config, "max_source_positions", None) or length
        return 2 * blocks * heads * head * length

    def other_models(self, checkpoint: Checkpoint, options: Any) -> Mapping[str, OtherModel]:
        """An empty mapping: a vision tower is part of the model."""
        return {}
