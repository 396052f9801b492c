"""Fit a LoRA trained beside the emulator's weight to the base model's weight.

On the subspace that the LoRA reads, the row space of A, the corrected sum must act as the emulator
did (EMLoC section 3.3): `s·B_c·A = s·B·A + E·P`, `E = W_e − W`, `P = Aᵀ(AAᵀ)⁻¹A`. With
`A = Q Σ Vᵀ`, direction i reads `vᵢᵀx` and writes column i of `s·B·Q·Σ`; its correction is column i
of `D = E·V`. So

    B_c = B + D·diag(c)·Σ⁺·Qᵀ / s,        c_i = min(1, L · mean|(s·B·Q·Σ)_i| / mean|D_i|)

where `L` limits the correction against the column it is added to, and no limit means c = 1.
Directions with a zero singular value read nothing and get nothing. `A` is unchanged, and only r
columns of E are ever formed: `E·V = W_e·V − W·V`, where `W_e` is an operator.

Precision: products with the weights in float32 (float64 if the base is), from weights, never from
outputs; everything of size r in float64.

DoRA runs `m · (W + s·B·A) / ‖W + s·B·A‖` (norms per output row). With B_c as above both sums agree
on P, so the magnitude that keeps the quotient is `m_c = m · ‖W + s·B_c·A‖ / ‖W_e + s·B·A‖`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from emloc.linalg.gram import moment_dtype
from emloc.linalg.operator import Operator, product


@dataclass(frozen=True)
class Mismatch:
    """One layer's LoRA in the singular basis of A, and what the emulator's weight adds to it.

    Attributes:
        up: `B`, float64.
        scaling: `alpha / r`, or `alpha / √r` for rsLoRA; never folded into B.
        reads: `Q·Σ`, how the rows of A combine the directions; `s·B·reads` is what each writes.
        drift: `E·V`, what each direction would have to write in addition.
        back: `Σ⁺·Qᵀ`, from directions to the rows of A.
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
        clipped: how many directions the limit scaled back.
        residual: `‖(W + s·B_c·A)P − (W_e + s·B·A)P‖_F` with this B.
    """

    up: Float[Tensor, "d_out rank"]
    clipped: int
    residual: float


def measure(
    weight: Float[Tensor, "d_out d_in"],
    emulated: Operator,
    down: Float[Tensor, "rank d_in"],
    up: Float[Tensor, "d_out rank"],
    scaling: float,
) -> Mismatch:
    """Compare the base's `weight` with the emulator's where `down` (A) reads.

    Args:
        emulated: the emulator's weight, d_out × d_in.
    """
    a = down.to(torch.float64)
    q, sigma, vt = torch.linalg.svd(a, full_matrices=False)
    floor = sigma.max() * max(a.shape) * torch.finfo(down.dtype).eps
    alive = sigma > floor
    inverse = torch.where(alive, 1.0 / torch.where(alive, sigma, 1.0), 0.0)
    high = moment_dtype(weight.dtype)
    v = vt.T.to(high)
    drift = emulated @ v - product(weight, v)
    b = up.to(torch.float64)
    return Mismatch(
        up=b,
        scaling=scaling,
        reads=q * (sigma * alive),
        drift=drift.to(torch.float64) * alive,
        back=inverse[:, None] * q.T,
    )


def correct_up(mismatch: Mismatch, limit: float | None) -> Corrected:
    """`B_c` under `limit` (a factor ≥ 0; None: unlimited; 0: no correction at all)."""
    drift_size = mismatch.drift.abs().mean(0)
    if limit is None:
        share = torch.ones_like(drift_size)
    else:
        written = mismatch.scaling * (mismatch.up @ mismatch.reads)
        allowed = limit * written.abs().mean(0)
        share = torch.where(
            drift_size > allowed,
            allowed / drift_size.clamp(min=torch.finfo(torch.float64).tiny),
            1.0,
        )
    up = mismatch.up + (mismatch.drift * share) @ mismatch.back / mismatch.scaling
    return Corrected(up, int((share < 1).sum()), residual(mismatch, up))


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
