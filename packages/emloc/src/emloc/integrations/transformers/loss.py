"""The loss of language modelling, summed so that batches can be added up."""

from typing import Any

import torch
from torch import nn

from emloc.family import Batch, LossSum

IGNORED = -100
"""The label of a token without loss."""


def next_token_loss(model: Any, batch: Batch) -> LossSum:
    """Cross-entropy of the next token over labelled tokens, from logits in float32 or better.

    Args:
        batch: what the model's forward takes, and `labels`, samples × tokens.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    high = torch.promote_types(logits.dtype, torch.float32)
    loss = nn.functional.cross_entropy(logits[:, :-1][kept].to(high), labels[kept], reduction="sum")
    return LossSum(float(loss.detach()), int(kept.sum()))
