"""Round a weight to a grid so that the layer's outputs on data change little.

The error of a row, `e = w − q`, costs `eᵀ G e` for the inputs' second moments `G`. GPTQ (Frantar et al.,
arXiv 2210.17323) rounds one input after another, and moves those that are left so that they make up for the
error. With `G = R Rᵀ`, R upper triangular, the cost is `Σ_k (R_kk e_k + Σ_{i<k} R_ik e_i)²`, so what the k-th
weight must make up for is `Σ_{i<k} e_i R_ik / R_kk`: the same choice without an inverse of `G`, by one
Cholesky factorisation of `G` with its axes reversed.

Inputs with large moments come first, as they leave most to be made up for. `damping · mean(diag G)` is added
to the diagonal, and more where that does not suffice, so that few samples or a dead input do no harm.

Precision: float32, and the factorisation of fewer than `DOUBLE_BELOW` inputs in float64. In float32 it is off
by about 6e-8 of the largest of the diagonal, so by 6e-8 · columns of its mean at most: a tenth of the damping
at 11008 inputs.
"""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emloc.linalg.gram import Moments
from emloc.linalg.grid import Grid
from emloc.linalg.ridged_cholesky import ridged_cholesky
from emloc.linalg.symmetric import blocks_of

DAMPING = 0.01
DOUBLE_BELOW = 1024
"""Inputs from which the moments are factorised in float32."""

BLOCK = 128
"""Inputs that are rounded before the errors of all are carried on in one product."""

STRIP = 32
"""Inputs of a block that are rounded one by one before their errors are carried on within the block."""


Nearest = Callable[[int, Tensor], Tensor]
"""Gives what stands for the weights of a column, rows, given what they should come to."""


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
        scales, inverses, zeros = (part.T.contiguous() for part in grid.by_group())
        codes = torch.empty(weight.shape[1], weight.shape[0], device=weight.device)

        def nearest(column: int, target: Tensor) -> Tensor:
            code, group = codes[column], column // grid.group_size
            torch.addcmul(zeros[group], target, inverses[group], out=code)
            code.round_().clamp_(0, grid.levels)
            return (code - zeros[group]).mul_(scales[group])

        self.carry(weight, nearest)
        return codes.to(torch.uint8).T.contiguous()

    def carry(self, weight: Float[Tensor, "rows columns"], nearest: Nearest) -> None:
        """Choose what stands for each input's weights, after the errors of those before it.

        Args:
            nearest: gives what stands for a column's weights, by the column and what it should come to,
                once for each.
        """
        order, carried = self._order.tolist(), self._carried
        columns = weight.float().T[
            self._order
        ]  # columns × rows: each step works on a contiguous row
        errors = torch.zeros_like(columns)
        for start in range(0, len(order), BLOCK):
            stop = min(start + BLOCK, len(order))
            targets = columns[start:stop]
            if start:
                targets = torch.addmm(targets, carried[:start, start:stop].T, errors[:start])
            for first in range(start, stop, STRIP):
                last = min(first + STRIP, stop)
                strip = targets[first - start : last - start]
                if first > start:
                    within = carried[start:first, first:last]
                    strip = torch.addmm(strip, within.T, errors[start:first])
                for at in range(first, last):
                    target = strip[at - first]
                    if at > first:
                        within = carried[first:at, at]
                        target = torch.addmv(target, errors[first:at].T, within)
                    torch.sub(columns[at], nearest(order[at], target), out=errors[at])


def squared_output(
    weight: Float[Tensor, "rows columns"], moments: Float[Tensor, "columns columns"]
) -> float:
    """`‖W X‖_F²` on inputs with these moments."""
    weight, moments, squared = weight.float(), moments.float(), 0.0
    for inside in blocks_of(weight.shape[1]):  # what is left of the diagonal is a copy
        rows, part = weight[:, inside], moments[inside]
        twice = (rows @ part[:, inside.stop :]).mul_(weight[:, inside.stop :])
        squared += 2 * float(twice.sum()) + float((rows @ part[:, inside]).mul_(rows).sum())
    return 0.0 if squared < 0 else squared  # rounding may make nothing negative; NaN stays NaN


def squared_change(error: Float[Tensor, "d_out d_in"], moments: Moments) -> float:
    """Squared change of a layer's outputs by an error of its weight, weighed where it is known by what.

    Args:
        moments: of the inputs; by their `rows` errors are weighed.
    """
    weighed = error if moments.rows is None else moments.rows.weigh(error.float())
    return squared_output(weighed, moments.matrix)


def _carried(moments: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """`R_ik / R_kk` in the order of rounding, strictly upper triangular, and `R_kk²`, both float32; and what
    the diagonal got.
    """
    backwards = order.flip(0)
    kind = torch.float64 if len(order) < DOUBLE_BELOW else torch.float32
    matrix = moments[backwards][:, backwards].to(kind)
    root, ridge = ridged_cholesky(matrix, damping * float(matrix.diagonal().mean()) or 1.0)
    del matrix
    upper = root.float().flip(0, 1)
    del root
    diagonal = upper.diagonal().clone()
    return upper.div_(diagonal).triu_(diagonal=1), diagonal.square_(), ridge
