"""Add a LoRA to a weight, with PEFT's arithmetic.

`W + (B·A)·s`, and for DoRA `m / ‖W + (B·A)·s‖ · (W + (B·A)·s)`, norms per output row. In float32 the
operations and their order are those of PEFT's `merge_and_unload`, so the bits are the same; half
precision is computed in float32 and rounded once.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def merged_weight(
    weight: Float[Tensor, "d_out d_in"],
    down: Float[Tensor, "rank d_in"],
    up: Float[Tensor, "d_out rank"],
    scaling: float,
    magnitude: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "d_out d_in"]:
    """The merged weight, in `weight`'s dtype."""
    high = torch.promote_types(weight.dtype, torch.float32)
    base = weight.to(high)
    delta = (up.to(high) @ down.to(high)) * scaling
    if magnitude is None:
        merged = base + delta
    else:
        norm = torch.linalg.norm(base + delta, dim=1).to(high)
        merged = (magnitude.to(high) / norm).view(-1, 1) * (base + delta)
    return merged.to(weight.dtype)
