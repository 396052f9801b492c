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

from typing import cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emloc.linalg.gram import Moments
from emloc.linalg.grid import Grid, nearest_codes
from emloc.linalg.ridged_cholesky import ridged_cholesky

DAMPING = 0.01
BLOCK = 128
"""Inputs that are rounded one by one before the errors of all are carried on in one product."""


class Feedback:
    """The order of rounding and the shares of errors that are carried on, for all weights of one input.

    Args:
        moments: `Σ x xᵀ` of the inputs, columns × columns; symmetric, may be singular.
        damping: share of the mean of its diagonal that is added to the diagonal.

    Attributes:
        ridge: all that was added to the diagonal.
        weights: `R_kk²`, by input: the cost of a squared error at input k, whatever is carried on.
    """

    def __init__(self, moments: Tensor, damping: float = DAMPING) -> None:
        self._order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        self._carried, diagonal, self.ridge = _carried(moments, self._order, damping)
        self.weights = torch.empty_like(diagonal)
        self.weights[self._order] = diagonal

    @classmethod
    def of(cls, moments: Moments) -> "Feedback":
        """Made once for all that is fitted to the moments of one input."""
        if "feedback" not in moments.derived:
            moments.derived["feedback"] = cls(moments.matrix)
        return cast(Feedback, moments.derived["feedback"])

    def round(
        self, weight: Float[Tensor, "rows columns"], grid: Grid
    ) -> UInt8[Tensor, "rows columns"]:
        """The codes on `grid`, each input making up for the errors of those before it."""
        order, carried = self._order, self._carried
        columns = weight.float().T[order]  # columns × rows: each step works on one contiguous row
        groups = (order // grid.group_size).tolist()
        scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.contiguous()
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
                target, scale, zero = targets[k], scales[groups[at]], zeros[groups[at]]
                if k:
                    target = torch.addmv(target, errors[start:at].T, within[:k, k])
                code = nearest_codes(target, scale, zero, grid.levels)
                codes[at] = code.to(torch.uint8)
                errors[at] = columns[at] - (code - zero) * scale
        return codes[torch.argsort(order)].T.contiguous()


def squared_output(
    weight: Float[Tensor, "rows columns"], moments: Float[Tensor, "columns columns"]
) -> float:
    """`‖W X‖_F²` on inputs with these moments."""
    squared = float((weight.float() @ moments.float() * weight).sum())
    return 0.0 if squared < 0 else squared  # rounding may make nothing negative; NaN stays NaN


def _carried(moments: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """`R_ik / R_kk` in the order of rounding, strictly upper triangular, and `R_kk²`, both float32; and what
    the diagonal got.
    """
    backwards = order.flip(0)
    matrix = moments[backwards][:, backwards].double()
    root, ridge = ridged_cholesky(matrix, damping * float(matrix.diagonal().mean()) or 1.0)
    del matrix
    upper = root.float().flip(0, 1)
    del root
    diagonal = upper.diagonal().clone()
    return upper.div_(diagonal).triu_(diagonal=1), diagonal.square_(), ridge
