"""The share of an error of outputs that the best factors of some rank leave.

The best product of rank r takes the r largest eigenvalues of `E G Eᵀ` away from an error `E` of a weight
(`emloc.linalg.lowrank`). They are found by subspace iteration (Halko, Martinsson and Tropp, arXiv 0909.4061)
from a start that is drawn anew from the same seed, so that reruns agree.

Precision: float32, eigenvalues of the small matrix in float64.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.linalg.rounding import squared_output

BEYOND = 16
"""Directions that are followed beside those that are asked for."""

ROUNDS = 3


def left_by_rank(
    error: Float[Tensor, "d_out d_in"],
    moments: Float[Tensor, "d_in d_in"],
    ridge: float,
    ranks: Sequence[int],
) -> list[float]:
    """The share of the squared outputs of an error that is left by the best factors of each rank.

    Args:
        moments: of the inputs, float32.
        ridge: that is added to their diagonal.
    """
    error = error.float()
    error = error / error.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    dearest = float(moments.diagonal().amax()) + ridge
    if not dearest > 0 or not bool(error.any()):
        return [1.0 if rank == 0 else 0.0 for rank in ranks]

    def read(columns: Tensor) -> Tensor:
        """`(G + ridge) Eᵀ` of some columns, in units of the dearest input."""
        seen = error.T @ columns
        return (moments.float() @ seen).add_(seen, alpha=ridge).div_(dearest)

    whole = squared_output(error, moments) + ridge * float(error.square().sum())
    whole /= dearest
    count = min(max(ranks) + BEYOND, *error.shape)
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(error.shape[0], count, generator=draw).to(error.device)
    for _ in range(ROUNDS):
        basis, _ = torch.linalg.qr(basis)
        basis = error @ read(basis)
    basis, _ = torch.linalg.qr(basis)
    small = ((error.T @ basis).T @ read(basis)).double()
    values = torch.linalg.eigvalsh((small + small.T) / 2).flip(0).clamp(min=0)
    taken = values.cumsum(0) / whole
    return [
        1.0 if rank == 0 else max(0.0, 1.0 - float(taken[min(rank, count) - 1])) for rank in ranks
    ]
