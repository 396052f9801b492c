"""Round a weight to a grid so that the layer's outputs on data change little.

The error of a row, `e = w − q`, costs `eᵀ G e` for the inputs' second moments `G`. GPTQ (Frantar et al.,
arXiv 2210.17323) rounds one input after another, and moves those that are left so that they make up for the
error. With `G = R Rᵀ`, R upper triangular, the cost is `Σ_k (R_kk e_k + Σ_{i<k} R_ik e_i)²`, so what the k-th
weight must make up for is `Σ_{i<k} e_i R_ik / R_kk`: the same choice without an inverse of `G`, by one
Cholesky factorisation of `G` with its axes reversed.

Inputs with large moments come first, as they leave most to be made up for. `damping · mean(diag G)` is added
to the diagonal, and more where that does not suffice, so that few samples or a dead input do no harm.

Precision: the factorisation is in float64, all else in float32.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emloc.linalg.grid import Grid

DAMPING = 0.01
BLOCK = 128
"""Inputs that are rounded one by one before the errors of all are carried on in one product."""


class Rounded(NamedTuple):
    """A rounded weight.

    Attributes:
        codes: rows × columns.
        error: `W − Q`, rows × columns, float32.
    """

    codes: UInt8[Tensor, "rows columns"]
    error: Float[Tensor, "rows columns"]


def round_with_feedback(
    weight: Float[Tensor, "rows columns"],
    moments: Float[Tensor, "columns columns"],
    grid: Grid,
    damping: float = DAMPING,
) -> Rounded:
    """Round to `grid`, each input making up for the errors of those before it.

    Args:
        moments: `Σ x xᵀ` of the inputs; symmetric, may be singular.
        damping: share of the mean of its diagonal that is added to the diagonal.
    """
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    carried = _carried(moments, order, damping)
    columns = weight.float().T[order]  # columns × rows: each step works on one contiguous row
    group_of = order // grid.group_size
    scales, zeros = grid.scales.T[group_of], grid.zeros.T[group_of]
    codes = torch.empty_like(columns, dtype=torch.uint8)
    errors = torch.zeros_like(columns)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        targets = columns[start:stop]
        if start:
            targets = torch.addmm(targets, carried[:start, start:stop].T, errors[:start])
        within = carried[start:stop, start:stop]
        for k in range(stop - start):
            at = start + k
            target = targets[k]
            if k:
                target = torch.addmv(target, errors[start:at].T, within[:k, k])
            code = _nearest(target, scales[at], zeros[at], grid.levels)
            codes[at] = code.to(torch.uint8)
            errors[at] = columns[at] - (code - zeros[at]) * scales[at]
    back = torch.argsort(order)
    return Rounded(codes[back].T.contiguous(), errors[back].T.contiguous())


def relative_output_error(
    error: Float[Tensor, "rows columns"],
    weight: Float[Tensor, "rows columns"],
    moments: Float[Tensor, "columns columns"],
) -> float:
    """`‖E X‖_F / ‖W X‖_F` for an error E of W on inputs with these moments; 0 where W outputs nothing."""
    changed, whole = (float((m.float() @ moments * m).sum()) for m in (error, weight))
    return (max(0.0, changed) / whole) ** 0.5 if whole > 0 else 0.0


def _nearest(target: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    safe = torch.where(scale > 0, scale, 1.0)
    return (target / safe + zero).round_().clamp_(0, levels)


def _carried(moments: Tensor, order: Tensor, damping: float) -> Tensor:
    """`R_ik / R_kk` in the order of rounding, float32, strictly upper triangular."""
    matrix = moments.double()[order][:, order]
    mean = float(matrix.diagonal().mean())
    ridge = damping * mean or 1.0
    reversed_ = matrix.flip(0, 1)
    del matrix
    while True:
        reversed_.diagonal().add_(ridge)
        root, failed = torch.linalg.cholesky_ex(reversed_)
        if not int(failed):
            break
        ridge *= 10
    upper = root.flip(0, 1)
    return torch.triu(upper / upper.diagonal(), diagonal=1).float()
