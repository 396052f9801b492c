"""Train a LoRA with TRL's `SFTTrainer` on tokenised samples."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from emloc.adapters.going_on import goes_on_from
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.errors import ConfigError
from emloc.integrations.transformers.capacity import load_capacity
from emloc.integrations.transformers.family import TransformersFamily
from emloc.integrations.transformers.generation import (
    closing_tokens,
    say_endless,
    say_missing_ends,
)
from emloc.integrations.transformers.held_back import hold_back
from emloc.integrations.transformers.loading import load_tokenizer
from emloc.integrations.transformers.lora_training import train_lora as train_with
from emloc.integrations.transformers.lora_training import training_arguments
from emloc.integrations.transformers.loss import IGNORED, next_token_loss
from emloc.integrations.transformers.sampling import in_batches
from emloc.integrations.transformers.streamed_training import frozen_model
from emloc.integrations.transformers.tables import evaluation_split
from emloc.machine.memory import PeakMemory, return_large_blocks
from emloc.machine.progress import warn
from emloc_llm.activations import TILE_ROWS, TILE_TOKENS
from emloc_llm.data import (
    Sample,
    cut,
    encode_all,
    learnable,
    load_samples,
    pad,
    say_truncated,
    seen,
)
from emloc_llm.heads import HEADS_OF_THEIR_OWN
from emloc_llm.rows import load_rows
from emloc_llm.streamed_samples import StreamedSamples

COMPARED_TOKENS = 16
"""Tokens on which TRL's loss is compared with the model's own."""


@torch.no_grad()
def _balanced(model: Any, ids: torch.Tensor) -> bool:
    """Return whether TRL gets a balancing loss; it reads names of a config that not all experts have."""
    given = {"input_ids": ids, "labels": ids, "output_router_logits": True}
    try:
        return model(**given, use_cache=False, fused_lm_head=True).aux_loss is not None
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False


class Trainer(SFTTrainer):
    """TRL's trainer without its usage report, and with a loss for CPUs and for heads of any kind."""

    _fused: bool | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """TRL's loss: cross-entropy per labelled token.

        TRL (1.16) takes it tile by tile over the vocabulary. Without Triton it scores padding and prompts
        too, in some twenty passes, which on a CPU takes almost half of a step of SmolLM2-135M. Where the
        logits of labelled tokens alone are no larger than such a tile, they are taken at once.

        TRL multiplies by the head's weight itself. A streamed model's head has it while it is called, and
        no longer, and some heads are more than a weight (ModernBERT's has a layer before it, RecurrentGemma's
        bounds the logits): there, logits of labelled tokens are always the model's own.
        """
        labels = inputs["labels"]
        streamed = getattr(self, "streamed", None) is not None
        if streamed and self.aux_loss_enabled:  # a block's router leaves no graph behind
            self.aux_loss_enabled = False
            warn(
                "stream=true: experts' routers are not balanced; the loss is that of the tokens alone"
            )
        here = self.args.device.type == "cpu" and self.accelerator.num_processes == 1
        at_once = here and not return_outputs and self._fits_a_tile(labels)
        tiled = not streamed and (self.aux_loss_enabled or not at_once)
        if tiled and self._fused_head_is_own(model, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        total, terms = next_token_loss(self.accelerator.unwrap_model(model), inputs)
        loss = total / max(1, int(terms if num_items_in_batch is None else num_items_in_batch))
        return (loss, {"loss": loss}) if return_outputs else loss

    def _fused_head_is_own(self, model: Any, inputs: dict[str, Any]) -> bool:
        """Return whether TRL's loss is the model's own; found out once, on a few tokens."""
        if self._fused is None:
            ids = inputs["input_ids"][:1, :COMPARED_TOKENS]
            training = model.training
            model.eval()  # nothing is drawn at random
            try:
                self._fused = self._compared(model, ids)
                unbalanced = self.aux_loss_enabled and not (self._fused and _balanced(model, ids))
            finally:
                model.train(training)
            inner = self.accelerator.unwrap_model(model).get_base_model()
            kind = type(inner).__name__
            if not self._fused:
                warn(
                    f"train: TRL's loss is not that of {kind}'s own logits, so it is taken from whole logits "
                    f"of the labelled tokens, which take memory"
                )
            if unbalanced:
                self.aux_loss_enabled = False
                inner.config.get_text_config().output_router_logits = False  # which TRL reads, too
                warn(
                    f"train: TRL cannot balance the experts' routers of {kind}; the loss is that of the "
                    f"tokens alone"
                )
        return self._fused

    @torch.no_grad()
    def _compared(self, model: Any, ids: torch.Tensor) -> bool:
        inner = self.accelerator.unwrap_model(model)
        if inner.config.get_text_config().model_type in HEADS_OF_THEIR_OWN:
            return False
        given: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if self.aux_loss_enabled:
            given["output_router_logits"] = False
        try:
            own, count = next_token_loss(inner, given)
            fused = -model(**given, use_cache=False, fused_lm_head=True).log_probs.sum()
        except torch.OutOfMemoryError:  # which is a RuntimeError, and says nothing of a head
            raise
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False
        exact = not (self.args.bf16 or self.args.fp16) and all(
            p.dtype.itemsize >= 4 for p in inner.parameters() if p.is_floating_point()
        )
        # Rounding, of logits and of their sums: what differs for another reason differs by more.
        each, share = (1e-4, 1e-5) if exact else (3e-2, 5e-3)
        return bool((own - fused).abs() <= count * each + share * own.abs())

    def _fits_a_tile(self, labels: torch.Tensor) -> bool:
        config: Any = cast(Any, self.model).config
        vocabulary: int = config.get_text_config().vocab_size
        tile = min(labels.numel(), TILE_TOKENS) * min(vocabulary, TILE_ROWS)
        return int((labels[:, 1:] != IGNORED).sum()) * vocabulary <= tile

    def _send_telemetry(self) -> None:
        pass


def train_lora(config: Any, work: Path, family: TransformersFamily) -> dict[str, Any]:
    """Train into `work`; returns figures for the manifest.

    Raises:
        DataError, ConfigError, NumericalError: see their messages.
    """
    # Without it, activations freed in one step are still there in the next: 6 to 10 % more memory
    # for some 7 % of time, measured on SmolLM2-135M on two cores.
    return_large_blocks()
    with PeakMemory(config.device, mapped=not config.stream, limit=config.memory) as peak:
        figures = _train(config, work, family)
    return {**figures, **peak.figures()}


def _train(config: Any, work: Path, family: TransformersFamily) -> dict[str, Any]:
    path = locate(config.emulator or str(config.model_name_or_path))
    tokenizer = load_tokenizer(path)
    if config.streaming and config.num_held_back_samples:
        raise ConfigError(
            "train: streaming cannot hold samples back; pass num_held_back_samples=0, or leave streaming "
            "out."
        )
    if config.streaming and config.max_steps <= 0:
        raise ConfigError("train: streaming needs max_steps, since the data's length is not known.")
    capacity = load_capacity(path, AutoModelForCausalLM)
    if config.packing:
        capacity.check_packed(config.max_length)
    read = StreamedSamples(config, tokenizer, capacity) if config.streaming else None
    samples = [] if read else learnable(load_samples(config, tokenizer, config.seed))
    evaluation = None
    if config.eval_dataset:
        evaluation = learnable(_evaluation_samples(config, tokenizer))
    all_samples = [*samples, *(evaluation or [])]
    capacity.check((ids for s in all_samples for ids in seen(s, config)), tokenizer, "The samples")
    samples, held_back = _split(samples, config)
    arguments = training_arguments(
        SFTConfig,
        config,
        work,
        max_length=config.max_length,
        packing=config.packing,
        packing_strategy="wrapped",  # the others need kernels that keep samples apart
    )
    torch.manual_seed(config.seed)
    make_trainer = partial(
        Trainer,
        args=arguments,
        train_dataset=read.data() if read else _dataset(samples),
        eval_dataset=_dataset(evaluation) if evaluation else None,
        processing_class=tokenizer,
    )
    checkpoint = Checkpoint.open(path)
    model = frozen_model(family, checkpoint, config, work)
    closing = closing_tokens((s.input_ids[s.prompt_length :] for s in samples), tokenizer)
    say_missing_ends(model, tokenizer, closing)
    answers = (s.input_ids for s in samples if s.reference is not None and not s.truncated)
    say_endless(answers, tokenizer)
    alone = learnable([cut(sample, config.max_length) for sample in samples])
    parts = in_batches(alone, config.per_device_train_batch_size)
    batches = (pad(part, tokenizer.pad_token_id) for part in parts)
    unmarked = deepcopy(tokenizer)  # as it came, whatever training makes of it
    figures = train_with(
        config,
        work,
        model,
        make_trainer,
        batches,
        task_type=family.task_type,
        family=family,
        adapter=goes_on_from(config, family, checkpoint),
        held_back=_dataset(held_back) if held_back else None,
    )
    unmarked.save_pretrained(work)  # not before: a refusal leaves nothing behind
    figures["summary"] |= (
        read.figures()
        if read
        else {
            "samples": len(samples),
            "truncated_samples": sum(sample.truncated for sample in samples),
        }
    )
    return figures


def _split(samples: list[Sample], config: Any) -> tuple[list[Sample], list[Sample]]:
    """Samples to learn from, and those held back, which are scored as they are and so must fit alone."""
    alone = {id(s): cut(s, config.max_length) for s in samples}
    fitting = [s for s in samples if learnable([alone[id(s)]])]
    _, held_back = hold_back(fitting, config)
    chosen = {id(sample) for sample in held_back}
    rest = [sample for sample in samples if id(sample) not in chosen]
    return rest, [alone[id(sample)] for sample in held_back]


def _evaluation_samples(config: Any, tokenizer: Any) -> list[Sample]:
    name = config.eval_dataset
    samples = encode_all(load_rows(config, name, evaluation_split(config)), tokenizer, config, name)
    say_truncated(samples, config, f"samples of {name}")
    return samples


def _dataset(samples: list[Sample]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {"input_ids": [s.input_ids for s in samples], "labels": [s.labels for s in samples]}
    )
