"""The best rank-k weight for given activations: one symmetric eigenproblem, no inverse of `G`.

Of all rank-k matrices, `W_e = U Uᵀ W` minimises `Σ ‖(W − W_e) x‖²`, where `U` holds the top-k
eigenvectors of `W G Wᵀ` (EMLoC section 3.2 reaches the same optimum by whitening `G` and a full
SVD). The eigenvalues left out are the error: `Σ_{i>k} λ_i = ‖(W − W_e) Xᵀ‖_F²`.

Three ways to the eigenvectors, by what was measured and by shape:

- moments of the outputs are `W G Wᵀ` itself;
- moments of the inputs and d_out ≤ d_in: form `W G Wᵀ`;
- moments of the inputs and d_out > d_in: with `WᵀW = RᵀR` (Cholesky), the eigenvectors `Z` of
  `R G Rᵀ`, d_in × d_in, give `U = W R⁻¹ Z` and `UᵀW = ZᵀR`. `G` may be singular (fewer tokens than
  inputs): it is never inverted. Where `WᵀW` is singular, a ridge keeps R invertible; it changes
  `W_e` in directions alone that W maps to almost nothing.

Where the loss minds errors of some outputs more than of others (`emloc.linalg.row_weights`), `S W` takes the
place of `W`, and the left factor becomes `S⁻¹ U`; errors are those of the weighed outputs.

Precision: below `DENSE_BELOW` all in float64, by a dense solver: activations of language models have
a few dimensions thousands of times larger than the rest, and a float32 solver's error is relative to
the largest eigenvalue. From there on products in float32 (float64 for a float64 base) and block
Lanczos (`emloc.linalg.eigen`), whose products err entry by entry, so that a huge eigenvalue disturbs the
others by some 1e-9 of it. Outliers among the eigenvalues are found in float64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.errors import NumericalError
from emloc.linalg.eigen import dense_eigenvectors, leading_eigenvectors
from emloc.linalg.finite import refuse_not_finite
from emloc.linalg.gram import Moments
from emloc.linalg.ridged_cholesky import ridged_cholesky
from emloc.linalg.symmetric import add_gram, between_upper, mirror_upper, times_upper

DENSE_BELOW = 1024
"""Eigenproblems smaller than this are solved densely, in float64."""


class Factors(NamedTuple):
    """`left @ right` is the compressed weight.

    Attributes:
        left: orthonormal columns, the top eigenvectors; of weighed outputs, `S⁻¹` times those.
        right: `Uᵀ W`, or `Uᵀ S W`.
        relative_error: `‖(W − W_e) Xᵀ‖_F / ‖W Xᵀ‖_F`, from the eigenvalues; 0 where the layer outputs
            nothing.
        excess: by how much that error exceeds the optimum, relative, as a partial eigensolver
            estimates; 0 from a dense one.
        values: the leading eigenvalues, descending, float64.
        total: the sum of all eigenvalues.
    """

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]
    relative_error: float
    excess: float
    values: Float[Tensor, " rank"]
    total: float


def relative_error(values: Sequence[float], total: float) -> float:
    """The error of a weight that keeps these eigenvalues of that total."""
    return (max(0.0, total - sum(values)) / total) ** 0.5 if total > 0 else 0.0


def factorise(
    weights: Sequence[Float[Tensor, "_ d_in"]] | Float[Tensor, "d_out d_in"],
    moments: Moments,
    rank: int,
) -> Factors:
    """Compress a weight to `rank` (at most min(d_out, d_in)), optimally for `moments`.

    Args:
        weights: one weight, or those of layers that share their input, taken as one stack.

    Raises:
        NumericalError: the weight holds NaN or infinity, or its outputs are beyond their dtype.
    """
    parts = [weights] if isinstance(weights, Tensor) else list(weights)
    refuse_not_finite(moments.name, parts)
    stored, d_in = parts[0].dtype, parts[0].shape[1]
    d_out = sum(part.shape[0] for part in parts)
    rank = min(rank, d_out, d_in)
    size = d_out if moments.side == "output" else min(d_out, d_in)
    small = size < DENSE_BELOW
    high = torch.float64 if small else torch.promote_types(stored, torch.float32)
    parts = [part.to(high) for part in parts]
    matrix = moments.matrix.to(high)
    rows = moments.rows
    if rows is not None:
        parts = [rows.weigh(torch.cat(parts))]
        matrix = rows.on_both_sides(matrix) if moments.side == "output" else matrix
    root = None
    if moments.side == "input" and d_out <= d_in:
        weight = torch.cat(parts)
        matrix = weight @ matrix @ weight.T
    elif moments.side == "input":
        root = _root(parts)
        nothing = not any(bool(part.any()) for part in parts)  # the root has a ridge all the same
        matrix = between_upper(root, torch.zeros_like(matrix) if nothing else matrix)
    if root is None:
        matrix = (matrix + matrix.T) / 2
    total = float(matrix.diagonal().double().sum())
    if not math.isfinite(total):
        raise NumericalError(
            f"Layer {moments.name}: its outputs are too large to be squared in {high}; exclude it."
        )
    leading = (dense_eigenvectors if small else leading_eigenvectors)(matrix, rank)
    del matrix
    left, right = (
        _project(parts, leading.vectors) if root is None else _unroot(parts, leading.vectors, root)
    )
    if rows is not None:
        left = rows.unweigh(left)
    tail = total - float(leading.values.sum()) if rank < size else 0.0
    error = (max(0.0, tail) / total) ** 0.5 if total > 0 else 0.0
    return Factors(
        left.to(stored), right.to(stored), error, leading.excess, leading.values.cpu(), total
    )


def _project(weights: Sequence[Tensor], vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`U` and `UᵀW`."""
    pieces = vectors.split([weight.shape[0] for weight in weights])
    right = pieces[0].T @ weights[0]
    for piece, weight in zip(pieces[1:], weights[1:]):
        right.addmm_(piece.T, weight)
    return vectors, right


def _unroot(weights: Sequence[Tensor], vectors: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """`W R⁻¹ Z` and `ZᵀR`."""
    right = times_upper(vectors.T, root)
    mixing = torch.linalg.solve_triangular(root, vectors, upper=True)
    return torch.cat([weight @ mixing for weight in weights]), right


def _root(weights: Sequence[Tensor]) -> Tensor:
    """`R` of `RᵀR = WᵀW + ridge`, with as little ridge as the rounding of `WᵀW` allows."""
    d_in = weights[0].shape[1]
    square = weights[0].new_zeros(d_in, d_in)
    for weight in weights:
        add_gram(square, weight)
    mirror_upper(square)
    scale = float(square.diagonal().max()) or 1.0
    return ridged_cholesky(square, 8 * torch.finfo(square.dtype).eps * scale, upper=True)[0]
