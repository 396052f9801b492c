"""What the planner needs to know of causal language models (`PlannedFamily`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.config import DataOptions, TrainConfig
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

TASK_TYPE = "CAUSAL_LM"
"""PEFT's name of what these models are for."""


class PlannedLLM(PlannedTransformer):
    """`PlannedFamily` for causal language models."""

    def planned_batch(self, checkpoint: Checkpoint, options: DataOptions, samples: int) -> Batch:
        """Samples of `max_length` tokens; where there are several, some will be padded."""
        ids = torch.empty(samples, options.max_length, dtype=torch.int64, device="meta")
        padded = samples > 1 and not getattr(options, "packing", False)
        masks = {"attention_mask": ids} if padded else {}
        return {"input_ids": ids, **masks, "labels": ids}

    def adapted_layers(self, model: nn.Module, options: TrainConfig) -> Sequence[str]:
        """See `PlannedFamily`."""
        return adapted_layers(model, options)

    def stacks(self, checkpoint: Checkpoint) -> Sequence[int]:
        """The decoder's blocks."""
        return [depth(checkpoint.config)]

    def shallow(self, checkpoint: Checkpoint, blocks: Sequence[int]) -> Checkpoint:
        """See `PlannedFamily`."""
        assert isinstance(checkpoint, Described)
        return checkpoint.having(cut(checkpoint.config, blocks[0]))

    def trainable(self, checkpoint: Checkpoint, groups: Groups, options: TrainConfig) -> nn.Module:
        """With TRL's loss in place of the head."""
        from trl.trainer.utils import add_fused_lm_head  # seconds to import

        from emloc.integrations.peft.planned import with_planned_lora

        model: Any = emulator_skeleton(checkpoint, AutoModelForCausalLM, groups, options.dtype)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if options.gradient_checkpointing:
            run_blocks_twice(model)
        return with_planned_lora(model, options, task_type=TASK_TYPE)

    def trainers_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """As TRL's `SFTTrainer` computes it, where all tokens are labelled."""
        out = model(**batch, use_cache=False, fused_lm_head=True)
        return -out.log_probs.sum(), batch["labels"].numel()

    def step_sizes(
        self, model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
    ) -> StepSizes | None:
        """See `PlannedFamily`; `emloc_llm.activations`."""
        from emloc_llm.activations import step_sizes

        return step_sizes(model, layers, batch, options)
