"""Fit a LoRA trained beside the emulator's weight to the base model's weight.

On the subspace that the LoRA reads, the row space of A, the corrected sum must act as the emulator
did (EMLoC section 3.3): `s·B_c·A = s·B·A + E·P`, `E = W_e − W`, `P = Aᵀ(AAᵀ)⁻¹A`. With
`A = Q Σ Vᵀ`, direction i reads `vᵢᵀx` and writes column i of `s·B·Q·Σ`; its correction is column i
of `D = E·V`. So

    B_c = B + D·diag(c)·Σ⁺·Qᵀ / s,        c_i = min(1, L · mean|(s·B·Q·Σ)_i| / mean|D_i|)

where `L` limits the correction against the column it is added to, and no limit means c = 1.
Directions with a zero singular value read nothing and get nothing. `A` is unchanged, and only r
columns of E are ever formed: `E·V = W_e·V − W·V`, where `W_e` is an operator.

**What the data mind.** The fit above treats all directions alike; data do not. With `G = Σ x xᵀ` the sum over
what the layer reads, the least squares of `‖(E − s·(B_c − B)·A) X‖_F` is

    B_c = B + E·G·Aᵀ·(A·G·Aᵀ)⁺ / s

of which a share t may be taken. `C = G·Aᵀ = Σ x (A x)ᵀ`, d_in × r, is all that it needs of the data. With
`A·C = Q Λ Qᵀ` it is the same formula in the directions `C·Q·Λ^(−½)`, of which direction i is combined by
column i of `Q·Λ^½`; residuals are then those of the outputs on the data, in what A reads.

Precision: products with the weights in float32 (float64 if the base is), from weights, never from
outputs; everything of size r in float64.

DoRA runs `m · (W + s·B·A) / ‖W + s·B·A‖` (norms per output row). With B_c as above both sums agree
on P, so the magnitude that keeps the quotient is `m_c = m · ‖W + s·B_c·A‖ / ‖W_e + s·B·A‖`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.linalg.gram import moment_dtype
from emloc.linalg.operator import Operator, product


class Basis(NamedTuple):
    """Directions in which a LoRA reads; float64.

    Attributes:
        directions: `V`, that the mismatch is measured on.
        reads: how the rows of A combine the directions: `A = reads·(…)`, zero where nothing is read.
        back: from directions to the rows of A, the pseudo-inverse of `reads`.
    """

    directions: Float[Tensor, "d_in rank"]
    reads: Float[Tensor, "rank rank"]
    back: Float[Tensor, "rank rank"]


@dataclass(frozen=True)
class Mismatch:
    """One layer's LoRA in a basis of what A reads, and what the emulator's weight adds to it.

    Attributes:
        up: `B`, float64.
        scaling: `alpha / r`, or `alpha / √r` for rsLoRA; never folded into B.
        reads: how the rows of A combine the directions; `s·B·reads` is what each writes.
        drift: `E·V`, what each direction would have to write in addition.
        back: from directions to the rows of A.
    """

    up: Float[Tensor, "d_out rank"]
    scaling: float
    reads: Float[Tensor, "rank rank"]
    drift: Float[Tensor, "d_out rank"]
    back: Float[Tensor, "rank rank"]


@dataclass(frozen=True)
class Corrected:
    """The corrected `B` (float64), with what happened to the layer's directions.

    Attributes:
        clipped: how many directions were scaled back.
        residual: `‖(W + s·B_c·A)P − (W_e + s·B·A)P‖_F` with this B; on the data, if the basis is of data.
    """

    up: Float[Tensor, "d_out rank"]
    clipped: int
    residual: float


def plain_basis(down: Float[Tensor, "rank d_in"]) -> Basis:
    """The singular directions of A: `V`, `Q·Σ` and `Σ⁺·Qᵀ`.

    Args:
        down: `A`, exactly as it runs. A coarser dtype than single precision makes none of its directions less
            real, so what counts as zero is no more than single precision tells from it.
    """
    a = down.to(torch.float64)
    q, sigma, vt = torch.linalg.svd(a, full_matrices=False)
    eps = min(torch.finfo(dtype).eps for dtype in (down.dtype, torch.float32))
    alive = sigma > sigma.max() * max(a.shape) * eps
    inverse = torch.where(alive, 1.0 / torch.where(alive, sigma, 1.0), 0.0)
    return Basis(vt.T * alive, q * (sigma * alive), inverse[:, None] * q.T)


def data_basis(down: Float[Tensor, "rank d_in"], crossed: Float[Tensor, "d_in rank"]) -> Basis:
    """The directions in which A reads data: `C·Q·Λ^(−½)`, `Q·Λ^½` and `Λ^(−½)·Qᵀ`.

    Args:
        crossed: `C = Σ x (A x)ᵀ`; of data of which A reads nothing, no direction is left.
    """
    c = crossed.to(torch.float64)
    square = down.to(torch.float64) @ c
    values, q = torch.linalg.eigh((square + square.T) / 2)
    # A sum in single precision tells no less than this from nothing.
    alive = values > values.max().clamp(min=0) * max(c.shape) * torch.finfo(torch.float32).eps
    root = torch.where(alive, values, 0.0).sqrt()
    inverse = torch.where(alive, 1.0 / torch.where(alive, root, 1.0), 0.0)
    return Basis(c @ (q * inverse), q * root, inverse[:, None] * q.T)


def measure(
    weight: Float[Tensor, "d_out d_in"],
    emulated: Operator,
    basis: Basis,
    up: Float[Tensor, "d_out rank"],
    scaling: float,
) -> Mismatch:
    """Compare the base's `weight` with the emulator's in the directions that a LoRA reads.

    Args:
        emulated: the emulator's weight, d_out × d_in.
        up: B.
    """
    v = basis.directions.to(moment_dtype(weight.dtype))
    drift = emulated @ v - product(weight, v)
    return Mismatch(up.to(torch.float64), scaling, basis.reads, drift.to(torch.float64), basis.back)


def correct_up(mismatch: Mismatch, limit: float | None, share: float = 1.0) -> Corrected:
    """`B_c`, or a share of the way to it.

    Args:
        limit: of each direction, a factor ≥ 0; None: unlimited; 0: no correction at all.
        share: of the correction that the limit leaves, at most 1.
    """
    drift_size = mismatch.drift.abs().mean(0)
    if limit is None:
        kept = torch.ones_like(drift_size)
    else:
        written = mismatch.scaling * (mismatch.up @ mismatch.reads)
        allowed = limit * written.abs().mean(0)
        kept = torch.where(
            drift_size > allowed,
            allowed / drift_size.clamp(min=torch.finfo(torch.float64).tiny),
            1.0,
        )
    up = mismatch.up + (mismatch.drift * (share * kept)) @ mismatch.back / mismatch.scaling
    return Corrected(up, int((kept < 1).sum()), residual(mismatch, up))


def residual(mismatch: Mismatch, up: Float[Tensor, "d_out rank"]) -> float:
    """`‖(W + s·up·A)P − (W_e + s·B·A)P‖_F`; pass the B that will be stored, after rounding."""
    change = mismatch.scaling * (up.to(torch.float64) - mismatch.up)
    return float((change @ mismatch.reads - mismatch.drift).norm())


def dora_magnitude(
    magnitude: Float[Tensor, " d_out"],
    base_sum: Float[Tensor, "d_out d_in"],
    emulator_sum: Float[Tensor, "d_out d_in"],
) -> Float[Tensor, " d_out"]:
    """DoRA's magnitude for the base: `m · ‖W + s·B_c·A‖ / ‖W_e + s·B·A‖`, norms per row."""
    ratio = base_sum.norm(dim=1).double() / emulator_sum.norm(dim=1).double().clamp(min=1e-30)
    return (magnitude.double() * ratio).to(magnitude.dtype)
