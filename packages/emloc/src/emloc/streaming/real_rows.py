"""Take padding out of what a layer reads, and never guess where it is.

A family's mask says which tokens are real, in the shape that they have in the micro-batch. A layer may read
them in that shape (samples × tokens × d), with axes merged (all tokens × d) or with an axis of one in
between. Anything else, tokens before samples, a prompt put in front, another number of rows, means that the
mask is of something else than what is read. It would be silently wrong to use it, and to leave it out.

Experts are the exception: they read the tokens that chose them, in an order of their own, padding among
them; all of those count. So is a vocabulary's head, which a loss may give the labelled tokens alone.
"""

from itertools import accumulate
from math import prod
from operator import mul

from torch import Tensor, nn

from emloc.errors import ConfigError
from emloc.extend.capabilities import token_mask_of
from emloc.extend.family import Batch, ModelFamily


def real_rows(values: Tensor, mask: Tensor | None, what: str) -> Tensor:
    """The rows of `values` (…, d) that are no padding, as rows × d.

    Args:
        mask: true where a token is real; None where all are.
        what: what reads or writes the values, for messages.

    Raises:
        ConfigError: the mask is of another shape than the values.
    """
    rows = values.reshape(-1, values.shape[-1])
    if mask is None:
        return rows
    if not same_order(tuple(values.shape[:-1]), tuple(mask.shape)):
        if not bool(rows.any()):  # what stands for a state before the first token
            return rows[:0]
        raise ConfigError(
            f"{what} has {_shown(values.shape[:-1])} rows where {_shown(mask.shape)} tokens are padded to "
            f"one length, so it is unclear which of them are padding; use calibration_batch_size=1, where "
            f"nothing is padded, or exclude it."
        )
    return rows[mask.reshape(-1).to(rows.device)]


def may_be_expert(model: nn.Module, block: str, layer: str) -> bool:
    """Return whether a layer lies in one of several modules that a block has side by side in a list or dict.

    Experts do, and so do parts that run one after another (T5's); `input_mask` tells them apart.
    """
    parts = layer[len(block) + 1 :].split(".")  # nothing, where a block is itself a layer
    above = [f"{block}.{'.'.join(parts[:depth])}" for depth in range(1, len(parts))]
    return any(isinstance(model.get_submodule(n), (nn.ModuleList, nn.ModuleDict)) for n in above)


def input_mask(
    family: ModelFamily, batch: Batch, layer: str, values: Tensor, listed: bool
) -> Tensor | None:
    """The family's mask of what a layer reads; None for an expert, whose rows are in an order of their own.

    Args:
        values: what it reads; an expert is given rows × d, those that chose it.
        listed: see `may_be_expert`; or a head that was given some tokens of all.
    """
    return None if listed and values.ndim == 2 else token_mask_of(family, batch, layer)


def is_head(model: nn.Module, layer: str) -> bool:
    """Return whether a layer is what makes logits of a model that says so, as transformers' do."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and model.get_submodule(layer) is head


def same_order(shape: tuple[int, ...], mask: tuple[int, ...]) -> bool:
    """Return whether one is the other with neighbouring axes merged: flattened, both count alike."""
    ends, others = set(accumulate(shape, mul)), set(accumulate(mask, mul))
    return prod(shape) == prod(mask) and (ends - {1} <= others or others - {1} <= ends)


def _shown(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
