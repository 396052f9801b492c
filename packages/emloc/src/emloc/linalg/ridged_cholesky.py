"""Cholesky factors of matrices that are positive semidefinite up to rounding."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.errors import NumericalError

GROWTH = 10


def ridged_cholesky(
    matrix: Float[Tensor, "d d"], ridge: float, upper: bool = False
) -> tuple[Float[Tensor, "d d"], float]:
    """The factor of `matrix + ridge`, with as much more of a ridge as it takes, and all that was added.

    Args:
        matrix: symmetric; its diagonal is changed.

    Raises:
        NumericalError: no ridge helps, so the matrix holds NaN or infinity.
    """
    added, step = 0.0, ridge
    while math.isfinite(step):
        matrix.diagonal().add_(step)
        added += step
        root, failed = torch.linalg.cholesky_ex(matrix, upper=upper)
        if not int(failed):
            return root, added
        step *= GROWTH
    raise NumericalError(
        "Second moments, or the square of a weight, hold NaN or infinity; check the base model (emloc "
        "verify) and its dtype."
    )
