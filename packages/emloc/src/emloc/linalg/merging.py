"""Add a LoRA to a weight, with PEFT's arithmetic.

`W + (B·A)·s`, and for DoRA `m / ‖W + (B·A)·s‖ · (W + (B·A)·s)`, norms per output row. In float32 the
operations and their order are those of PEFT's `merge_and_unload`, so the bits are the same; half
precision is computed in float32 and rounded once.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.linalg.gram import moment_dtype

ROWS = 256
"""Rows of a weight that are computed at a time."""


def merged_weight(
    weight: Float[Tensor, "d_out d_in"],
    down: Float[Tensor, "rank d_in"],
    up: Float[Tensor, "d_out rank"],
    scaling: float,
    magnitude: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "d_out d_in"]:
    """The merged weight, in `weight`'s dtype."""
    high = moment_dtype(weight.dtype)
    merged = torch.empty_like(weight)
    a = down.to(high)
    buffer = a.new_empty(ROWS, weight.shape[1])
    # Rows are independent. A few at a time stay in the processor's cache, and no float32 copy of the
    # weight is ever made.
    for start in range(0, weight.shape[0], ROWS):
        rows = slice(start, start + ROWS)
        b = up[rows].to(high)
        total = torch.mm(b, a, out=buffer[: b.shape[0]])
        total *= scaling
        total += weight[rows].to(high)  # float8 adds to nothing as it is
        if magnitude is not None:
            norm = torch.linalg.norm(total, dim=1)
            total *= (magnitude[rows].to(high) / norm).view(-1, 1)
        merged[rows] = total
    return merged
