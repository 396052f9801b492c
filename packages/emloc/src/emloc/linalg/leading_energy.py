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

BEYOND = 16
"""Directions that are followed beside those that are asked for."""

ROUNDS = 3


def left_by_rank(
    error: Float[Tensor, "d_out d_in"], moments: Float[Tensor, "d_in d_in"], ranks: Sequence[int]
) -> list[float]:
    """The share of the squared outputs of an error that is left by the best factors of each rank.

    Args:
        moments: of the inputs.
    """
    error, moments = error.float(), moments.float()
    # Numbers of any size: shares are the same.
    error = error / error.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    moments = moments / moments.diagonal().amax().clamp(min=torch.finfo(torch.float32).tiny)
    whole = float(((error @ moments) * error).sum(dtype=torch.float64))
    if not whole > 0 or not ranks:
        return [1.0 if rank == 0 else 0.0 for rank in ranks]
    count = min(max(ranks) + BEYOND, *error.shape)
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(error.shape[0], count, generator=draw).to(error.device)
    for _ in range(ROUNDS):
        basis, _ = torch.linalg.qr(basis)
        basis = error @ (moments @ (error.T @ basis))
    basis, _ = torch.linalg.qr(basis)
    read = error.T @ basis
    values = torch.linalg.eigvalsh((read.T @ (moments @ read)).double()).flip(0).clamp(min=0)
    taken = values.cumsum(0) / whole
    return [
        1.0 if rank == 0 else max(0.0, 1.0 - float(taken[min(rank, count) - 1])) for rank in ranks
    ]
