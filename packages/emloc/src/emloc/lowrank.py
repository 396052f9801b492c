"""The best rank-k weight for given activations: one symmetric eigenproblem, no inverse.

Of all rank-k matrices, `W_e = U Uᵀ W` minimises `Σ ‖(W − W_e) x‖²`, where `U` holds the top-k
eigenvectors of `W G Wᵀ` (EMLoC section 3.2 reaches the same optimum by whitening `G` and a full
SVD). The eigenvalues left out are the error: `Σ_{i>k} λ_i = ‖(W − W_e) Xᵀ‖_F²`.

Three ways to the eigenvectors, by what was measured and by shape:

- moments of the outputs are `W G Wᵀ` itself;
- moments of the inputs and d_out ≤ d_in: form `W G Wᵀ`;
- moments of the inputs and d_out > d_in: with `W = Q R` it equals `Q (R G Rᵀ) Qᵀ`, so the
  eigenproblem is d_in × d_in. `G` may be singular (fewer tokens than inputs): nothing is inverted.

Precision: the eigenproblem is solved in float64. Activations of language models have a few
dimensions thousands of times larger than the rest, and a float32 solver's error is relative to the
largest eigenvalue, which would drown the tail. The factors come back in `weight`'s dtype.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.errors import NumericalError
from emloc.finite import is_finite
from emloc.gram import Moments


class Factors(NamedTuple):
    """`left @ right` is the compressed weight.

    Attributes:
        left: orthonormal columns, the top eigenvectors.
        right: `leftᵀ W`.
        spectrum: all eigenvalues of `W G Wᵀ` that can differ from zero, descending, float64.
    """

    left: Float[Tensor, "d_out rank"]
    right: Float[Tensor, "rank d_in"]
    spectrum: Float[Tensor, " n"]


def factorise(weight: Float[Tensor, "d_out d_in"], moments: Moments, rank: int) -> Factors:
    """Compress `weight` to `rank` (at most min(d_out, d_in)), optimally for `moments`.

    Raises:
        NumericalError: the weight holds NaN or infinity.
    """
    d_out, d_in = weight.shape
    if not is_finite(weight):
        raise NumericalError(
            f"Layer {moments.name}: its weight holds NaN or infinity; restore the checkpoint "
            f"from its source before compressing it."
        )
    rank = min(rank, d_out, d_in)
    w = weight.to(torch.float64)
    matrix = moments.matrix.to(torch.float64)
    if moments.side == "output":
        basis, product = None, matrix
    elif d_out <= d_in:
        basis, product = None, w @ matrix @ w.T
    else:
        basis, r = torch.linalg.qr(w)
        product = r @ matrix @ r.T
    eigenvalues, eigenvectors = torch.linalg.eigh((product + product.T) / 2)
    top = eigenvectors[:, -rank:].flip(1)
    left = top if basis is None else basis @ top
    spectrum = eigenvalues.flip(0).clamp(min=0.0)
    return Factors(left.to(weight.dtype), (left.T @ w).to(weight.dtype), spectrum)


def relative_error(spectrum: Float[Tensor, " n"], rank: int) -> float:
    """`‖(W − W_e) Xᵀ‖_F / ‖W Xᵀ‖_F`, from the eigenvalue tail; 0 where the layer outputs nothing."""
    total = float(spectrum.sum())
    return (float(spectrum[rank:].sum()) / total) ** 0.5 if total > 0 else 0.0
