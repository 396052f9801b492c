"""Data that a model has rows for: each micro-batch is checked when it is made, before it is run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from emloc.extend.family import Batch
from emloc.integrations.transformers.capacity import Capacity, capacity_of
from emloc.integrations.transformers.sampling import TrainingData


def fitting(data: TrainingData, skeleton: Callable[[], nn.Module]) -> TrainingData:
    """The same data, whose micro-batches of tokens must fit the model.

    Args:
        skeleton: gives the model, with weights or without; asked once, where there are tokens.

    Raises:
        DataError: when a micro-batch is made, that a sample has more tokens than the model has positions.
        CheckpointError: then, that the tokenizer gives a token that the model has no row for.
    """
    tokenizer: Any = getattr(data.processing, "tokenizer", data.processing)
    known: list[Capacity] = []

    def collate(part: Sequence[Any]) -> Batch:
        batch = data.collate(part)
        ids = batch.get("input_ids")
        if ids is not None and ids.ndim == 2 and hasattr(tokenizer, "convert_ids_to_tokens"):
            if not known:
                known.append(capacity_of(skeleton()))
            known[0].check(ids.tolist(), tokenizer, "The samples")
        return batch

    return replace(data, collate=collate)
