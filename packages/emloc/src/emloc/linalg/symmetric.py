"""`XᵀX` and triangular products at half the operations.

Half of a symmetric matrix is a copy of the other half. BLAS has routines for that (syrk, trmm); torch
does not reach them, so the upper triangle is computed in block rows, each one large product: at eight
block rows 9/16 of the multiplications remain. What is below the diagonal blocks is filled in at the
end, by `mirror_upper`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

BLOCKS = 8
"""Block rows of a triangle; more save little (1/2 + 1/16 of the operations are left) and are slower."""


def _starts(size: int) -> range:
    return range(0, size, max(256, -(-size // BLOCKS)))


def blocks_of(size: int) -> list[slice]:
    """Block rows of a triangle."""
    starts = _starts(size)
    return [slice(start, min(start + starts.step, size)) for start in starts]


def add_gram(total: Float[Tensor, "d d"], rows: Float[Tensor, "n d"]) -> None:
    """Add `rowsᵀ rows` to the upper triangle of `total`, in place; the rest of it is not to be read."""
    starts = _starts(rows.shape[1])
    for start in starts:
        stop = start + starts.step
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirror_upper(matrix: Float[Tensor, "d d"]) -> None:
    """Copy the upper triangle to the lower one, in place."""
    starts = _starts(matrix.shape[0])
    for start in starts:
        stop = start + starts.step
        diagonal = matrix[start:stop, start:stop]
        diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def times_upper(rows: Float[Tensor, "n d"], upper: Float[Tensor, "d d"]) -> Float[Tensor, "n d"]:
    """`rows @ upper` for an upper triangular matrix."""
    result = torch.empty_like(rows)
    starts = _starts(upper.shape[0])
    for start in starts:
        stop = start + starts.step
        result[:, start:stop] = rows[:, :stop] @ upper[:stop, start:stop]
    return result


def between_upper(
    upper: Float[Tensor, "d d"], middle: Float[Tensor, "d d"]
) -> Float[Tensor, "d d"]:
    """`upper @ middle @ upperᵀ` for a triangular and a symmetric matrix; symmetric to the last bit."""
    half = torch.empty_like(middle)
    result = torch.empty_like(middle)
    starts = _starts(upper.shape[0])
    for start in starts:
        stop = start + starts.step
        half[:, start:stop] = middle[:, start:] @ upper[start:stop, start:].T
    for start in starts:
        stop = start + starts.step
        result[start:stop, start:] = upper[start:stop, start:] @ half[start:, start:]
    mirror_upper(result)
    return result
