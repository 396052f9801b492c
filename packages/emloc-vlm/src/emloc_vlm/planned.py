"""What the planner needs to know of vision-language models (`PlannedFamily`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.config import TrainConfig
from emloc.errors import ConfigError
from emloc.extend.family import Batch
from emloc.integrations.transformers.planned import (
    PlannedTransformer,
    adapted_layers,
    emulator_skeleton,
    run_blocks_twice,
)
from emloc.integrations.transformers.shallow import cut, depth
from emloc.planning.family import Groups
from emloc.planning.operations import Layer
from emloc.planning.step import StepOptions, StepSizes
from emloc_vlm.parts import frozen_modules
from emloc_vlm.rows import CalibrationVisualOptions
from emloc_vlm_options import FreezeOptions

TASK_TYPE = "CAUSAL_LM"
"""PEFT's name of what these models are for: images are part of what precedes the text."""

MOST_TILES = 12
"""InternVL's own limit, where the config says none: that of its processor's files."""


class VisualTraining(TrainConfig, FreezeOptions):
    """The options of training, for annotations."""


class PlannedVLM(PlannedTransformer):
    """`PlannedFamily` for vision-language models."""

    def planned_batch(
        self, checkpoint: Checkpoint, options: CalibrationVisualOptions, samples: int
    ) -> Batch:
        """Samples of `max_length` tokens, each with an image of as many tiles as fit in them.

        Raises:
            ConfigError: not even one tile fits.
        """
        config = checkpoint.config
        length, vision = options.max_length, config["vision_config"]
        per_tile = _image_tokens(config)
        tiles = min(_tiles(config, options.max_dynamic_patch), (length - 1) // per_tile)
        if tiles == 0:
            raise ConfigError(
                f"max_length={length} leaves no room for an image, one of which takes {per_tile} tokens "
                f"in {checkpoint.name}; raise max_length."
            )
        ids = torch.empty(samples, length, dtype=torch.int64, device="meta")
        sides = vision.get("image_size", 224)
        sides = [sides, sides] if isinstance(sides, int) else sides
        pixels = torch.empty(samples * tiles, vision.get("num_channels", 3), *sides, device="meta")
        masks = {"attention_mask": ids} if samples > 1 else {}
        return {"input_ids": ids, **masks, "labels": ids, "pixel_values": pixels}

    def adapted_layers(self, model: nn.Module, options: VisualTraining) -> Sequence[str]:
        """Those of the parts that are trained."""
        return adapted_layers(model, options, frozen_modules(model, options))

    def stacks(self, checkpoint: Checkpoint) -> Sequence[int]:
        """The vision tower's blocks, and the language model's."""
        return [depth(checkpoint.config[part]) for part in ("vision_config", "text_config")]

    def shallow(self, checkpoint: Checkpoint, blocks: Sequence[int]) -> Checkpoint:
        """See `PlannedFamily`."""
        assert isinstance(checkpoint, Described)
        parts = zip(("vision_config", "text_config"), blocks)
        config = checkpoint.config
        return checkpoint.having({**config, **{p: cut(config[p], n) for p, n in parts}})

    def trainable(
        self, checkpoint: Checkpoint, groups: Groups, options: VisualTraining
    ) -> nn.Module:
        """See `PlannedFamily`."""
        from emloc.integrations.peft.planned import with_planned_lora

        model: Any = emulator_skeleton(
            checkpoint, AutoModelForImageTextToText, groups, options.dtype
        )
        if options.gradient_checkpointing:
            run_blocks_twice(model)
        return with_planned_lora(model, options, frozen_modules(model, options), TASK_TYPE)

    def trainers_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """As transformers' Trainer computes it, where all tokens are labelled."""
        return model(**batch, use_cache=False, num_items_in_batch=1).loss, batch["labels"].numel()

    def step_sizes(
        self, model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
    ) -> StepSizes | None:
        """See `PlannedFamily`; `emloc_vlm.activations`."""
        from emloc_vlm.activations import step_sizes

        return step_sizes(model, layers, batch, options)


def _image_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one tile, where the config says so."""
    return int(config.get("image_seq_length") or 1)


def _tiles(config: Mapping[str, Any], most: int | None) -> int:
    """Tiles of an image at most, the thumbnail included."""
    if "image_seq_length" not in config:
        return 1
    cut_up = config.get("dynamic_image_size", True)
    tiles = most or (int(config.get("max_dynamic_patch", MOST_TILES)) if cut_up else 1)
    return tiles + 1 if tiles > 1 else 1
