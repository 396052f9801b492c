"""Causal language models: any `AutoModelForCausalLM` whose blocks hold `nn.Linear`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import CalibrationOptions, DemoConfig, EvaluateConfig, TrainConfig
from emloc.extend.family import Batch
from emloc.integrations.transformers.capacity import capacity_of
from emloc.integrations.transformers.family import TransformersFamily
from emloc.integrations.transformers.loading import load_tokenizer
from emloc.integrations.transformers.loss import next_token_loss
from emloc.integrations.transformers.sampling import in_batches
from emloc.planning.operations import Layer
from emloc.planning.step import StepOptions, StepSizes
from emloc_llm.data import draw_samples, pad
from emloc_llm.heads import HEADS_OF_THEIR_OWN

OTHER_ROWS = frozenset({"cpmant", "prophetnet", "xlnet"})
"""Types whose layers do not read the micro-batch's tokens row by row: a learnt prompt stands in front,
several streams are read at once, or tokens come before samples. Their samples go one by one, unpadded."""


class LLMFamily(TransformersFamily):
    """`ModelFamily` for causal language models."""

    name = "llm"
    auto_class = AutoModelForCausalLM
    task_type = "CAUSAL_LM"

    def example(self, config: Any, samples: int, length: int) -> Batch:
        """Tokens, all of them real and labelled."""
        ids = torch.zeros(samples, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def forwards(self, model: nn.Module) -> Sequence[Callable[[Any], Any]]:
        """One, without a cache."""

        def read(fake: Any) -> None:
            inputs = self.example(fake.config, 1, 4)
            fake(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)

        return [read]

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

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See `ModelFamily`; `next_token_loss`."""
        return next_token_loss(model, batch)

    def train(self, config: TrainConfig, work: Path) -> dict[str, Any]:
        """See `ModelFamily`; with TRL, in `emloc_llm.training`."""
        from emloc_llm.training import train_lora

        return train_lora(config, work, self)

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """See `Evaluates`; `emloc_llm.evaluation`."""
        from emloc_llm.evaluation import evaluate_model

        return evaluate_model(config, self)

    def demo(self, config: DemoConfig) -> Path:
        """See `HasDemo`; `emloc_llm.demo`."""
        from emloc_llm.demo.demo import run_demo

        return run_demo(config)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """See `WritesExample`; `emloc_llm.example`."""
        from emloc_llm.example import write_example

        return write_example(folder, seed)

    def planned_batch(self, checkpoint: Checkpoint, options: Any, samples: int) -> Batch:
        """Samples of `max_length` tokens; where there are several, some will be padded."""
        batch = super().planned_batch(checkpoint, options, samples)
        padded = samples > 1 and not ("packing" in type(options).model_fields and options.packing)
        return {name: t for name, t in batch.items() if padded or name != "attention_mask"}

    def as_trained(self, model: nn.Module) -> nn.Module:
        """The model in training, with TRL's loss in place of the head where that is its own."""
        changed: Any = model
        if changed.config.get_text_config().model_type in HEADS_OF_THEIR_OWN:
            return model
        from trl.trainer.utils import add_fused_lm_head  # seconds to import

        add_fused_lm_head(changed, outputs=("log_probs", "entropy", "is_top1"))
        return changed

    def trainers_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The loss as `emloc_llm.training` computes it, where all tokens are labelled."""
        config: Any = model.config
        if config.get_text_config().model_type in HEADS_OF_THEIR_OWN:
            inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
            labels = batch["labels"][:, 1:].flatten()
            return nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)
        out = model(**batch, use_cache=False, fused_lm_head=True)
        return -out.log_probs.sum(), batch["labels"].numel()

    def step_sizes(
        self, model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
    ) -> StepSizes | None:
        """See `PlannedFamily`; `emloc_llm.activations`."""
        from emloc_llm.activations import step_sizes

        return step_sizes(model, layers, batch, options)
