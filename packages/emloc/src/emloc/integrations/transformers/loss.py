"""The loss of language modelling, taken where there is one: at tokens whose next token is labelled.

A vocabulary is large, so logits are a good part of a forward's memory and time. The model's head is
given the positions that count, and no others.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from emloc.extend.family import Batch
from emloc.streaming.call import current_call

IGNORED = -100
"""The label of a token without loss."""


def next_token_loss(model: Any, batch: Batch) -> tuple[Tensor, int]:
    """Cross-entropy of the next token, summed over labelled tokens, and their number.

    From logits in float32 or better, with its graph.

    Args:
        batch: what the model's forward takes, and `labels`, samples × tokens.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits = labelled_logits(model, labels, lambda: model(**inputs, use_cache=False))
    return summed_cross_entropy(logits, labels), len(logits)


def labelled_logits(model: nn.Module, labels: Tensor, forward: Callable[[], Any]) -> Tensor:
    """Logits at the positions whose next token is labelled, (labelled, vocabulary), sample by sample.

    Args:
        model: the one that `forward` runs, maybe within PEFT.
        labels: samples × tokens.
        forward: a forward pass without labels; its result has `logits`.
    """
    head, caller = _head(model), current_call()

    def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        # In lockstep, the hooks of all suspended calls hang on the one head.
        if current_call() is not caller:
            return None
        return (at_labels(inputs[0], labels), *inputs[1:])

    handle = None if head is None else head.register_forward_pre_hook(pick)
    try:
        return at_labels(forward().logits, labels)
    finally:
        if handle is not None:
            handle.remove()


def at_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Samples × tokens × values to labelled × values; what is in that form already stays as it is."""
    return values if values.dim() == 2 else values[:, :-1][labels[:, 1:] != IGNORED]


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over labelled tokens, with its graph.

    Args:
        logits: labelled × vocabulary.
        labels: samples × tokens.
    """
    wanted = labels[:, 1:]
    high = torch.promote_types(logits.dtype, torch.float32)
    return nn.functional.cross_entropy(logits.to(high), wanted[wanted != IGNORED], reduction="sum")


def _head(model: Any) -> nn.Module | None:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    find = getattr(inner, "get_output_embeddings", None)
    return None if find is None else cast("nn.Module | None", find())
