"""Data that a model has rows for: each micro-batch is checked when it is made, before it is run.

An encoder reads `input_ids`, and the decoder behind it is given `labels`, each with positions of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

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
    known: dict[str, Capacity] = {}

    def collate(part: Sequence[Any]) -> Batch:
        batch = data.collate(part)
        tokens = {name: batch[name] for name in ("input_ids", "labels") if _of_tokens(batch, name)}
        if tokens and hasattr(tokenizer, "convert_ids_to_tokens"):
            if not known:
                known.update(_capacities(skeleton()))
            for name in tokens.keys() & known.keys():
                known[name].check(tokens[name].clamp(min=0).tolist(), tokenizer, "The samples")
        return batch

    return replace(data, collate=collate)


def _of_tokens(batch: Batch, name: str) -> bool:
    held: Tensor | None = batch.get(name)
    return held is not None and held.ndim == 2 and not held.is_floating_point()


def _capacities(model: Any) -> dict[str, Capacity]:
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": capacity_of(model)}
    return {"input_ids": capacity_of(model, read=True), "labels": capacity_of(model)}
