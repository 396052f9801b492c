"""The loss of language modelling, summed so that batches can be added up."""

from typing import Any

import torch
from torch import nn

from emloc.family import Batch, LossSum
from emloc_llm.data import IGNORED


def next_token_loss(model: Any, batch: Batch) -> LossSum:
    """Cross-entropy of the next token over labelled tokens, from logits in float32 or better.

    Args:
        batch: `input_ids`, `attention_mask` and `labels`, each samples × tokens.
    """
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    labels = batch["labels"][:, 1:]
    kept = labels != IGNORED
    high = torch.promote_types(logits.dtype, torch.float32)
    loss = nn.functional.cross_entropy(logits[:, :-1][kept].to(high), labels[kept], reduction="sum")
    return LossSum(float(loss), int(kept.sum()))
