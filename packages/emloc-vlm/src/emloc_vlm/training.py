"""Train a LoRA on images and text with transformers' `Trainer`."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from emloc.artefacts.locate import locate
from emloc.config import TrainConfig
from emloc.errors import ConfigError
from emloc.integrations.transformers.lora_training import train_lora as train_with
from emloc.integrations.transformers.lora_training import training_arguments
from emloc.machine.memory import PeakMemory, return_large_blocks
from emloc_vlm.encode import collate
from emloc_vlm.examples import Example
from emloc_vlm.loading import load_vlm, load_vlm_capacity
from emloc_vlm.parts import frozen_modules
from emloc_vlm.planned import TASK_TYPE
from emloc_vlm.processor import load_processor
from emloc_vlm.rows import VisualOptions, load_examples, mixed_examples, readable
from emloc_vlm_options import FreezeOptions, ImageOptions


class VisualTrainConfig(TrainConfig, ImageOptions, FreezeOptions):
    """The options of training, for annotations."""


class Examples(Dataset[Example]):
    """Samples whose images are opened when a batch is made."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        """Their number."""
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        """One of them."""
        return self.examples[index]


def train_lora(config: TrainConfig, work: Path) -> dict[str, Any]:
    """Train into `work`; returns figures for the manifest.

    Raises:
        DataError, ConfigError, NumericalError: see their messages.
    """
    return_large_blocks()
    with PeakMemory(config.device, mapped=True, limit=config.memory) as peak:
        figures = _train(cast(VisualTrainConfig, config), work)
    return {**figures, **peak.figures()}


def _train(config: VisualTrainConfig, work: Path) -> dict[str, Any]:
    if config.streaming or config.packing:
        raise ConfigError("train: streaming and packing are for text; leave them out with images.")
    path = locate(config.emulator or str(config.model_name_or_path))
    processor = load_processor(path, config.max_dynamic_patch)
    options = cast(VisualOptions, config)
    examples = readable(mixed_examples(options, config.seed), config)
    evaluation = None
    if config.eval_dataset:
        split = "" if Path(config.eval_dataset).is_file() else config.eval_dataset_split
        evaluation = readable(load_examples(options, config.eval_dataset, split), config)
    arguments = training_arguments(TrainingArguments, config, work, remove_unused_columns=False)
    torch.manual_seed(config.seed)
    capacity = load_vlm_capacity(path)
    into_batch = partial(collate, processor=processor, options=config, capacity=capacity)
    make_trainer = partial(
        Trainer,
        args=arguments,
        train_dataset=Examples(examples),
        eval_dataset=Examples(evaluation) if evaluation else None,
        data_collator=into_batch,
        processing_class=processor,
    )
    model = load_vlm(path, config.dtype, config.device)

    def batches() -> Iterator[dict[str, Tensor]]:
        size = config.per_device_train_batch_size
        for start in range(0, len(examples), size):
            yield into_batch(examples[start : start + size])

    frozen = frozen_modules(model, config)
    figures = train_with(config, work, model, make_trainer, batches(), frozen, task_type=TASK_TYPE)
    processor.save_pretrained(work)
    figures["summary"] |= {"samples": len(examples)}
    return figures
