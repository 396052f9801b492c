"""Causal language models: any `AutoModelForCausalLM` whose blocks hold `nn.Linear`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import CalibrationOptions, DemoConfig, EvaluateConfig, TrainConfig
from emloc.extend.family import Batch, EmulatorLayers, StoredParameter
from emloc.integrations.transformers.capacity import capacity_of
from emloc.integrations.transformers.conversion import module_name, stored_parameter
from emloc.integrations.transformers.loading import load_tokenizer
from emloc.integrations.transformers.loss import next_token_loss
from emloc.integrations.transformers.quantizer import emulator_config
from emloc.integrations.transformers.skeleton import (
    empty_model,
    linears_within,
    repeated_blocks,
    shared_input_groups,
    shared_linears,
)
from emloc.integrations.transformers.untying import untied_config
from emloc_llm.data import draw_samples, in_batches, pad
from emloc_llm.planned import PlannedLLM

OTHER_ROWS = frozenset({"cpmant", "prophetnet", "xlnet"})
"""Types whose layers do not read the micro-batch's tokens row by row: a learnt prompt stands in front,
several streams are read at once, or tokens come before samples. Their samples go one by one, unpadded."""


class LLMFamily(PlannedLLM):
    """`ModelFamily` for causal language models."""

    name = "llm"
    adapter_formats: tuple[str, ...] = ("peft",)

    def native(self, checkpoint: Checkpoint) -> Checkpoint:
        """See `ModelFamily`."""
        return checkpoint

    def skeleton(self, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
        """See `ModelFamily`."""
        return empty_model(checkpoint, AutoModelForCausalLM, dtype)

    def stored(
        self, model: nn.Module, parameter: str, checkpoint: Checkpoint
    ) -> StoredParameter | None:
        """See `ModelFamily`."""
        return stored_parameter(model, parameter, checkpoint)

    def module_name(self, model: nn.Module, name: str) -> str:
        """See `KnowsOlderNames`."""
        return module_name(model, name)

    def untied_config(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any] | None:
        """See `UntiesWeights`."""
        return untied_config(checkpoint, model)

    def blocks(self, model: nn.Module) -> Sequence[str]:
        """See `ModelFamily`."""
        return repeated_blocks(model)

    def layer_groups(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """See `ModelFamily`."""

        def forward(fake: Any) -> None:
            ids = torch.zeros(1, 4, dtype=torch.int64)
            fake(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

        layers = linears_within(model, self.blocks(model))
        return shared_input_groups(model, layers, forward)

    def kept_dense(self, model: nn.Module) -> Mapping[str, str]:
        """See `ModelFamily`; linear layers of blocks are compressed where their weight is their own."""
        return shared_linears(model, self.blocks(model))

    def calibration_batches(
        self, checkpoint: Checkpoint, options: CalibrationOptions
    ) -> Sequence[Batch]:
        """Samples drawn by seed, longest first, so that a micro-batch pads little."""
        tokenizer = load_tokenizer(checkpoint.path)
        samples = draw_samples(options, tokenizer)
        capacity_of(self.skeleton(checkpoint, torch.float32)).check(
            (sample.input_ids for sample in samples), tokenizer, "The calibration samples"
        )
        samples.sort(key=lambda sample: -len(sample.input_ids))
        alone = checkpoint.config.get("model_type") in OTHER_ROWS
        size = 1 if alone else options.calibration_batch_size
        return [pad(part, tokenizer.pad_token_id) for part in in_batches(samples, size)]

    def token_mask(self, batch: Batch, layer: str | None = None) -> Tensor | None:
        """See `ModelFamily`."""
        mask = batch["attention_mask"].bool()
        return None if layer is not None and bool(mask.all()) else mask

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See `ModelFamily`; `next_token_loss`."""
        return next_token_loss(model, batch)

    def emulator_config(self, checkpoint: Checkpoint, layers: EmulatorLayers) -> dict[str, Any]:
        """See `ModelFamily`."""
        return emulator_config(checkpoint, layers)

    def train(self, config: TrainConfig, work: Path) -> dict[str, Any]:
        """See `ModelFamily`; `emloc_llm.training`."""
        from emloc_llm.training import train_lora

        return train_lora(config, work)

    def export_adapter(self, checkpoint: Checkpoint, folder: Path) -> Sequence[str]:
        """See `ModelFamily`; PEFT's format is the one that everybody reads."""
        return ()

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """See `ModelFamily`; `emloc_llm.evaluation`."""
        from emloc_llm.evaluation import evaluate_model

        return evaluate_model(config, self)

    def demo(self, config: DemoConfig) -> Path:
        """See `ModelFamily`; `emloc_llm.demo`."""
        from emloc_llm.demo.demo import run_demo

        return run_demo(config)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """See `ModelFamily`; `emloc_llm.example`."""
        from emloc_llm.example import write_example

        return write_example(folder, seed)
