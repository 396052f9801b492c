"""Train a LoRA on a family's samples with transformers' `Trainer`, by the family's own loss."""

from collections.abc import Callable, Container, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from emloc.adapters.going_on import goes_on_from
from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import TrainConfig
from emloc.extend.family import Batch, ModelFamily
from emloc.integrations.transformers.held_back import hold_back
from emloc.integrations.transformers.lora_training import train_lora, training_arguments
from emloc.integrations.transformers.sampling import TrainingData, in_batches
from emloc.integrations.transformers.streamed_training import frozen_model
from emloc.machine.progress import console


class Samples(Dataset[Any]):
    """A sequence as torch's loaders take it; samples are read when a micro-batch is made."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        """One of them."""
        return self.samples[index]


class LossTrainer(Trainer):
    """The Trainer with a family's loss per term; a step's is the mean of its micro-batches'."""

    def __init__(self, family: ModelFamily, **more: Any) -> None:
        super().__init__(**more)
        self._family = family
        # A micro-batch's loss is a mean, which accumulation divides whatever the model's forward takes.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the micro-batch; there is no output to return."""
        total, terms = self._family.loss(model, inputs)
        loss = total / max(1, terms)
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The loss alone."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None


@dataclass(frozen=True)
class TrainingWay:
    """The way in which a family trains.

    Attributes:
        task_type: PEFT's name of what the models are for, if it has one.
        frozen: modules of a model that no LoRA goes on, under the options.
        trainer_class: the Trainer or a subclass, with its own loss; None: `LossTrainer`.
    """

    task_type: str | None
    frozen: Callable[[Any, Any], Container[str]]
    trainer_class: Any


def train_on(
    family: ModelFamily,
    checkpoint: Checkpoint,
    data: TrainingData,
    how: TrainingWay,
    config: TrainConfig,
    work: Path,
) -> dict[str, Any]:
    """Train into `work`; returns figures for the manifest.

    Raises:
        DataError, ConfigError, NumericalError: see their messages.
    """
    model = frozen_model(family, checkpoint, config, work)
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        console.print(
            f"train: {type(model).__name__} does not support gradient_checkpointing, so all of its "
            f"activations are kept"
        )
        config = config.model_copy(update={"gradient_checkpointing": False})
    arguments = training_arguments(TrainingArguments, config, work, remove_unused_columns=False)
    torch.manual_seed(config.seed)
    kind = partial(LossTrainer, family) if how.trainer_class is None else how.trainer_class
    samples, held_back = hold_back(data.samples, config)
    make_trainer = partial(
        kind,
        args=arguments,
        train_dataset=Samples(samples),
        eval_dataset=Samples(data.evaluation) if data.evaluation else None,
        data_collator=data.collate,
        processing_class=data.processing,
    )

    def batches() -> Iterator[Batch]:
        for part in in_batches(samples, config.per_device_train_batch_size):
            yield data.collate(part)

    frozen = how.frozen(model, config)
    unmarked = deepcopy(data.processing)  # padding batches leaves its mark on it
    figures = train_lora(
        config,
        work,
        model,
        make_trainer,
        batches(),
        frozen,
        task_type=how.task_type,
        family=family,
        adapter=goes_on_from(config, family, checkpoint),
        held_back=Samples(held_back) if held_back else None,
    )
    if unmarked is not None:  # not before: a refusal leaves nothing behind
        unmarked.save_pretrained(work)
    figures["summary"] |= {"samples": len(samples)}
    return figures
