"""The weight that does on other inputs what a weight does on its own.

Where earlier layers are compressed, a layer reads `x̂` in place of `x`. Of all weights, the one that gives
back `W x` best is the regression of `W x` on `x̂`, held to W by a ridge (GPTAQ, arXiv 2504.02692, and Qronos,
arXiv 2505.11695, round towards such a target):

    W* = argmin ‖W X − W* X̂‖_F² + ρ ‖W* − W‖_F² = W (C + ρ) (H + ρ)⁻¹,    C = Σ x x̂ᵀ,  H = Σ x̂ x̂ᵀ

The ridge decides how much of what a few thousand tokens say about d² numbers is believed. SmolLM2-135M,
8,300 tokens, 2 bits in groups of 64, KL to the base: 1.46 without, 1.10 on x̂ with W itself as the target, and
0.57 with this one at ρ = 0.3 of the mean of H's diagonal.

Precision: float64 for fewer than `DOUBLE_BELOW` inputs, float32 from there on.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.linalg.ridged_cholesky import ridged_cholesky
from emloc.linalg.rounding import DOUBLE_BELOW

RIDGE = 0.3
"""The ridge as a share of the mean of the diagonal."""


def regressed(
    weight: Float[Tensor, "d_out d_in"],
    moments: Float[Tensor, "d_in d_in"],
    cross: Float[Tensor, "d_in d_in"],
) -> Float[Tensor, "d_out d_in"]:
    """`W*`, in the weight's dtype.

    Args:
        moments: `Σ x̂ x̂ᵀ`.
        cross: `Σ x x̂ᵀ`.

    Raises:
        NumericalError: the sums hold NaN or infinity.
    """
    kind = torch.float64 if weight.shape[1] < DOUBLE_BELOW else torch.float32
    ridge = RIDGE * float(moments.diagonal().double().mean())
    if ridge == 0:
        return weight
    matrix = moments.to(kind, copy=True)
    root, added = ridged_cholesky(matrix, ridge)
    wanted = weight.to(kind) @ cross.to(kind)
    wanted.add_(weight.to(kind), alpha=added)
    return torch.cholesky_solve(wanted.T, root).T.to(weight.dtype).contiguous()
