"""Is a tensor free of NaN and infinity? In one pass, without a temporary of its size."""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from emloc.errors import NumericalError

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
"""Dtypes that have no extremes in torch; compared in float16, which holds all of their values."""

CHUNK = 1 << 20
"""Elements of such a tensor that are converted at a time."""


def is_finite(tensor: Tensor) -> bool:
    """NaN and infinity both show in the extremes: NaN propagates, infinity is one."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    if tensor.dtype in FLOAT8:
        return all(is_finite(part.half()) for part in _chunks(tensor))
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def refuse_not_finite(layer: str, weights: Iterable[Tensor]) -> None:
    """Refuse weights that nothing can be fitted to.

    Raises:
        NumericalError: one holds NaN or infinity; names the layer.
    """
    if not all(is_finite(weight) for weight in weights):
        raise NumericalError(
            f"Layer {layer}: its weight holds NaN or infinity; restore the checkpoint "
            f"from its source before compressing it."
        )


def require_writable(name: str, tensor: Tensor, source: str) -> None:
    """Refuse to write a tensor that would spoil every model that reads it.

    Infinity is wrong in a weight and right in one thing that checkpoints hold: an additive attention mask,
    whose elements all are 0 or −∞.

    Args:
        source: what the tensor was read from or made of, for the message.

    Raises:
        NumericalError: it holds NaN, or infinity and is no such mask.
    """
    if not is_finite(tensor) and not is_mask(tensor):
        raise NumericalError(
            f"{name} of {source} is NaN or infinite in {str(tensor.dtype).removeprefix('torch.')}, so it is "
            f"not written; check what it was made from (emloc verify), and whether that dtype is wide "
            f"enough."
        )


def is_mask(tensor: Tensor) -> bool:
    """Return whether all elements are 0 or −∞."""
    if not tensor.is_floating_point() or tensor.dtype in FLOAT8:
        return False
    return all(bool(((part == 0) | (part == -torch.inf)).all()) for part in _chunks(tensor))


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return cast("tuple[Tensor, ...]", tensor.detach().reshape(-1).split(CHUNK))
