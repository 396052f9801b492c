"""The leading eigenvectors of a large symmetric positive semidefinite matrix, by block Lanczos.

A dense eigensolver computes all n eigenvectors when the k leading ones are wanted, half of it in
memory-bound steps. Block Lanczos (Golub & Underwood 1977; Golub & Van Loan, Matrix Computations,
section 10.3.6) works in large products: it builds an orthonormal basis of the Krylov space of a
random block, in which the matrix is block tridiagonal, and solves that smaller problem.

What is asked for is a subspace that holds as much of the trace as the best one does, to a tolerance,
not single eigenvectors: where eigenvalues lie close together, which of them is taken hardly matters.
The captured part falls short of the optimum by about `Σ rᵢ² / (θᵢ − d)`, second-order perturbation
theory with Ritz values θ, residuals r, and d the mean of the unexplored eigenvalues, which the trace
tells. Measured on power-law, exponential and random-matrix spectra, the true excess is three to five
times that, so `SAFETY` is applied. Two cases are left to a dense solver: a spectrum so flat that the
basis would have to be nearly the whole space, and one in which a probe of the complement finds an
eigenvalue that was missed (of more equal eigenvalues than a block has rows, no Krylov space sees all).

Precision: eigenvalues of language models' activations span 1e6 and more, and in float32 any solver,
dense or not, then loses a percent of the tail. The outliers are few: they are found in float64 by
subspace iteration and subtracted; the rest, by either solver, runs in the matrix's own dtype.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

BLOCK = 64
TOLERANCE = 1e-3
"""Estimated excess, relative, of the root of what is not captured, that a solution may have."""

SAFETY = 4.0
"""True excess over the perturbation estimate; see above."""

CHECKS = ((2.0, 8), (2.2, 10), (2.4, 12), (2.7, 16), (3.2, 20), (4.0, 24))
"""Basis sizes at which convergence is judged: multiples of the wanted count, but so many blocks at
least, since what converges is the number of products, not of vectors."""

LARGEST = 0.7
"""Beyond this share of n a dense solver is faster than a basis."""

OUTLIERS = 32
"""The number of leading eigenvalues that can be taken out as outliers."""

OUTLIER_RATIO = 100.0
"""An outlier is so many times larger than the last of those."""


def basis_sizes(size: int, count: int) -> list[int]:
    """Basis sizes at which convergence is judged; none where a dense solver is faster.

    Args:
        size: of the matrix.
        count: of the wanted eigenvectors.
    """
    sizes = [max(blocks, -(-int(factor * count) // BLOCK)) * BLOCK for factor, blocks in CHECKS]
    return [basis for basis in sizes if basis <= LARGEST * size]


class Leading(NamedTuple):
    """A subspace that is as good as the leading eigenvectors.

    Attributes:
        values: Ritz values, descending, float64.
        vectors: orthonormal columns.
        excess: estimate of `√(what they do not capture / the least possible) − 1`.
    """

    values: Float[Tensor, " count"]
    vectors: Float[Tensor, "n count"]
    excess: float


def dense_eigenvectors(matrix: Float[Tensor, "n n"], count: int) -> Leading:
    """`count` leading eigenvectors by a dense solver, in the matrix's dtype."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values[-count:].flip(0), vectors[:, -count:].flip(1)
    return Leading(values.clamp(min=0.0).double(), vectors, 0.0)


def leading_eigenvectors(matrix: Float[Tensor, "n n"], count: int) -> Leading:
    """`count` leading eigenvectors, by whichever solver is faster. `matrix` is overwritten."""
    outliers = _take_outliers(matrix, count)
    count -= outliers.values.numel()
    rest = _lanczos(matrix, count) or dense_eigenvectors(matrix, count)
    # Of vectors that have not quite converged a part lies along the outliers, where it costs most.
    overlap = outliers.vectors.T @ rest.vectors.double()
    vectors = rest.vectors - (outliers.vectors @ overlap).to(matrix.dtype)
    return Leading(
        torch.cat([outliers.values, rest.values]),
        torch.cat([outliers.vectors.to(matrix.dtype), vectors], dim=1),
        rest.excess,
    )


def _take_outliers(matrix: Tensor, count: int) -> Leading:
    """Find the outliers in float64 and subtract them from `matrix`, in place."""
    vectors = _random_rows(max(1, min(OUTLIERS, count // 2)), matrix).T
    # Each round shrinks the angle of what counts as an outlier by OUTLIER_RATIO; float32 goes as far
    # as its precision, then float64.
    for _ in range(3):
        vectors = torch.linalg.qr(matrix @ vectors)[0]
    vectors = torch.linalg.qr(_double_product(matrix, vectors.double()))[0]
    product = _double_product(matrix, vectors)
    values, mixing = torch.linalg.eigh(vectors.T @ product)
    outlying = values > OUTLIER_RATIO * float(values[0].clamp(min=0.0))
    if not bool(outlying.any()):
        return Leading(values[:0], vectors[:, :0], 0.0)
    values, vectors = values[outlying].flip(0), (vectors @ mixing[:, outlying]).flip(1)
    for rows, part in zip(matrix.split(512), vectors.split(512)):
        rows.copy_(rows.double() - (part * values) @ vectors.T)
    return Leading(values, vectors, 0.0)


def _double_product(matrix: Tensor, columns: Tensor) -> Tensor:
    """`matrix @ columns` in float64, without a float64 copy of the matrix."""
    return torch.cat([rows.double() @ columns for rows in matrix.split(512)])


def _random_rows(count: int, like: Tensor) -> Tensor:
    """Seeded, so that compressing twice gives the same bytes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, like.shape[0], generator=generator).to(like)


def _lanczos(matrix: Tensor, count: int) -> Leading | None:
    """Run Lanczos; None where a dense solver is faster or safer."""
    size = matrix.shape[0]
    sizes = basis_sizes(size, count)
    if not sizes:
        return None
    trace = float(matrix.diagonal().double().sum())
    basis = matrix.new_empty(sizes[-1], size)  # rows, so that the unused ones cost nothing
    projected = matrix.new_zeros(sizes[-1], sizes[-1])
    basis[:BLOCK] = _orthonormal(_random_rows(BLOCK, matrix))[0]
    for stop in range(BLOCK, sizes[-1] + BLOCK, BLOCK):
        fresh = _extend(matrix, basis, projected, stop)
        if fresh is None:
            return None
        rows, coupling = fresh
        if stop in sizes:
            values, mixing = torch.linalg.eigh(projected[:stop, :stop])
            residuals = (coupling.T @ mixing[-BLOCK:, -count:]).norm(dim=0).double()
            excess = _excess(values.double(), residuals, trace, size)
            if excess <= TOLERANCE:
                vectors = basis[:stop].T @ mixing[:, -count:].flip(1)
                missed = _largest_outside(matrix, vectors) > 2 * float(values[-count])
                return (
                    None if missed else Leading(values[-count:].flip(0).double(), vectors, excess)
                )
        if stop < sizes[-1]:
            basis[stop : stop + BLOCK] = rows
            projected[stop : stop + BLOCK, stop - BLOCK : stop] = coupling.T
            projected[stop - BLOCK : stop, stop : stop + BLOCK] = coupling
    return None


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows = lower @ q` with orthonormal rows q."""
    q, upper = torch.linalg.qr(rows.T)
    return q.T, upper.T


def _extend(
    matrix: Tensor, basis: Tensor, projected: Tensor, stop: int
) -> tuple[Tensor, Tensor] | None:
    """The next block of the basis and its coupling to the last; None at an invariant subspace."""
    known, newest = basis[:stop], basis[stop - BLOCK : stop]
    product = newest @ matrix
    diagonal = newest @ product.T
    projected[stop - BLOCK : stop, stop - BLOCK : stop] = (diagonal + diagonal.T) / 2
    # One pass leaves an error relative to the product, in which the largest eigenvalues dominate;
    # the next product would amplify it by their ratio to the rest.
    rows = product
    for _ in range(2):
        rows = rows - (rows @ known.T) @ known
    if float(rows.norm()) <= 1e-6 * float(product.norm()):
        return None
    fresh, coupling = _orthonormal(rows)
    steps = coupling.diagonal().abs()
    if float(steps.min()) < 1e-3 * float(steps.max()):  # of some rows little but rounding was left
        fresh, again = _orthonormal(fresh - (fresh @ known.T) @ known)
        coupling = coupling @ again
    return fresh, coupling


def _excess(values: Tensor, residuals: Tensor, trace: float, size: int) -> float:
    """Perturbation estimate of the excess error; ascending Ritz values, residuals of the last ones."""
    wanted = values[-residuals.numel() :]
    tail = max(0.0, trace - float(wanted.sum()))
    mean_outside = max(0.0, trace - float(values.sum())) / (size - values.numel())
    gap = (wanted - mean_outside).clamp(min=torch.finfo(values.dtype).tiny)
    lacking = SAFETY * float(torch.minimum(residuals, residuals.square() / gap).sum())
    if lacking <= 1e-9 * trace:
        return 0.0
    return (tail / (tail - lacking)) ** 0.5 - 1 if lacking < tail else float("inf")


def _largest_outside(matrix: Tensor, vectors: Tensor) -> float:
    """An estimate, from below, of the largest eigenvalue orthogonal to `vectors`."""
    rows = _random_rows(2 * BLOCK, matrix)[BLOCK:]  # others than the basis began with
    for _ in range(4):
        rows = rows - (rows @ vectors) @ vectors.T
        rows = _orthonormal(rows)[0] @ matrix
    rows = rows - (rows @ vectors) @ vectors.T
    return float(torch.linalg.matrix_norm(rows, ord=2)) if rows.numel() else 0.0
