"""The loss of a family's own forward, with its graph.

Families report losses as numbers, to be added up; here the logits of their forward are caught on the way
and the same loss is taken again, so that it can be differentiated.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from emloc.extend.family import ModelFamily
from emloc.integrations.transformers.loss import at_labels, summed_cross_entropy


def summed_loss(
    family: ModelFamily, model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Tensor, int]:
    """Cross-entropy of the next token summed over labelled tokens, and their number.

    Args:
        batch: on the model's device, with labels.
    """
    caught: list[Tensor] = []

    def catch(_: nn.Module, __: Any, output: Any) -> None:
        # In lockstep, calls that are suspended see those of others that finish; their own come last.
        caught[:] = [output.logits]

    handle = model.register_forward_hook(catch)
    try:
        family.forward_loss(model, batch)
    finally:
        handle.remove()
    labels = batch["labels"]
    logits = at_labels(caught[0], labels)
    return summed_cross_entropy(logits, labels), len(logits)
