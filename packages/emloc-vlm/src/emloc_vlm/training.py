"""Images and text as transformers' `Trainer` learns from them."""

from functools import partial
from typing import Any

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import ConfigError
from emloc.integrations.transformers.sampling import TrainingData
from emloc.integrations.transformers.tables import evaluation_split
from emloc_vlm.encode import collate
from emloc_vlm.loading import load_vlm_capacity
from emloc_vlm.processor import load_processor
from emloc_vlm.rows import load_examples, mixed_examples, readable


def training_data(checkpoint: Checkpoint, config: Any) -> TrainingData:
    """Samples whose images are opened when a batch is made.

    Raises:
        DataError, ConfigError: see their messages.
    """
    if config.streaming or config.packing:
        raise ConfigError("train: streaming and packing are for text; leave them out with images.")
    path = checkpoint.path
    processor = load_processor(path, config.max_dynamic_patch)
    examples = readable(mixed_examples(config, config.seed), config)
    evaluation = []
    if config.eval_dataset:
        split = evaluation_split(config)
        evaluation = readable(load_examples(config, config.eval_dataset, split), config)
    into_batch = partial(
        collate, processor=processor, options=config, capacity=load_vlm_capacity(path)
    )
    return TrainingData(examples, into_batch, evaluation, processor)
