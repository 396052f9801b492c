"""The correction against the float64 formula written out directly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.linalg import correction
from emloc.linalg.correction import correct_up, dora_magnitude, residual
from emloc.linalg.operator import Product


def layer(d_out=11, d_in=17, k=4, r=3, scale=0.7, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    return (random(d_out, d_in), random(d_out, k), random(k, d_in), random(r, d_in),
            random(d_out, r), scale)  # fmt: skip


def measure(weight, left, right, *others):
    down, *others = others
    return correction.measure(weight, Product(left, right), correction.plain_basis(down), *others)


def formula(weight, left, right, down, up, scale):
    """B_c = B + E·Aᵀ(AAᵀ)⁻¹ / s."""
    e = left @ right - weight
    return up + e @ down.T @ torch.linalg.inv(down @ down.T) / scale


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 5),
    st.floats(0.05, 8.0), st.integers(0, 10**6),
)  # fmt: skip
def test_without_limit_it_is_the_formula_and_leaves_no_residual(d_out, d_in, r, scale, seed):
    r = min(r, d_in)
    parts = layer(d_out, d_in, 2, r, scale, seed)
    weight, left, right, down, up, _ = parts
    found = correct_up(measure(*parts), None)
    gram = down @ down.T
    if torch.linalg.cond(gram) < 1e8:
        torch.testing.assert_close(found.up, formula(*parts), rtol=1e-5, atol=1e-5)
        projector = down.T @ torch.linalg.inv(gram) @ down
        wanted = (left @ right + scale * up @ down) @ projector
        got = (weight + scale * found.up @ down) @ projector
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert found.residual <= 1e-6 * (1 + residual(measure(*parts), up))
    assert found.clipped == 0


def test_residual_before_is_the_mismatch_on_the_row_space():
    parts = layer()
    weight, left, right, down, up, _ = parts
    projector = down.T @ torch.linalg.inv(down @ down.T) @ down
    before = ((left @ right - weight) @ projector).norm()
    assert residual(measure(*parts), up) == pytest.approx(float(before), rel=1e-9)


def test_scaling_is_not_folded_in():
    """A correction that forgot 1/s would be right only for s = 1."""
    parts = layer(scale=4.0)
    wrong = parts[4] + (formula(*parts) - parts[4]) * 4.0
    assert not torch.allclose(correct_up(measure(*parts), None).up, wrong)


def test_limit_is_per_singular_direction():
    parts = layer(seed=2)
    weight, left, right, down, up, scale = parts
    q, sigma, vt = torch.linalg.svd(down, full_matrices=False)
    e = left @ right - weight
    limit = 0.5
    total = torch.zeros_like(weight)
    clipped = 0
    for i in range(down.shape[0]):
        column = scale * up @ q[:, i] * sigma[i]
        drift = e @ vt[i]
        share = min(1.0, limit * float(column.abs().mean()) / float(drift.abs().mean()))
        clipped += share < 1
        total += torch.outer(column + share * drift, vt[i])
    found = correct_up(measure(*parts), limit)
    torch.testing.assert_close(scale * found.up @ down, total)
    assert found.clipped == clipped > 0
    assert 0 < found.residual < residual(measure(*parts), up)


def test_limit_zero_changes_nothing():
    parts = layer(seed=4)
    torch.testing.assert_close(correct_up(measure(*parts), 0.0).up, parts[4])


def test_duplicate_rows_of_a_are_one_direction():
    weight, left, right, down, up, scale = layer(r=3)
    down[2] = down[1]
    found = correct_up(measure(weight, left, right, down, up, scale), None)
    assert torch.isfinite(found.up).all()
    pinv = torch.linalg.pinv(down)
    e = left @ right - weight
    torch.testing.assert_close(scale * (found.up - up) @ down, e @ pinv @ down)


def test_float32_and_bfloat16_match_float64():
    exact = layer(40, 60, 8, 4, 2.0, seed=1)
    wanted = correct_up(measure(*exact), None).up
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        low = [part.to(dtype) if isinstance(part, torch.Tensor) else part for part in exact]
        # Rounding the inputs is not the correction's fault: compare with their float64 values.
        back = [part.double() if isinstance(part, torch.Tensor) else part for part in low]
        torch.testing.assert_close(
            correct_up(measure(*low), None).up, formula(*back), rtol=tolerance, atol=tolerance
        )
        assert (correct_up(measure(*low), None).up - wanted).abs().max() < 0.2


def test_dora_effective_weight_agrees_on_the_row_space():
    weight, left, right, down, up, scale = layer(seed=6)
    magnitude = torch.rand(11, dtype=torch.float64) + 0.5
    corrected = correct_up(measure(weight, left, right, down, up, scale), None).up
    emulated = left @ right + scale * up @ down
    based = weight + scale * corrected @ down
    new = dora_magnitude(magnitude, based, emulated)
    projector = down.T @ torch.linalg.inv(down @ down.T) @ down
    on_emulator = (magnitude / emulated.norm(dim=1))[:, None] * emulated
    on_base = (new / based.norm(dim=1))[:, None] * based
    torch.testing.assert_close(on_base @ projector, on_emulator @ projector)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lora_stored_in_half_precision_is_corrected_as_it_runs(dtype):
    """Wide layers: what a half-precision A reads is real, however coarse its numbers are."""
    w, left, right, down, up, scale = layer(d_out=8, d_in=2048, k=6, dtype=torch.float32)
    down, up = down.to(dtype), up.to(dtype)
    mismatch = measure(w, left, right, down, up, scale)
    fixed = correct_up(mismatch, None)
    wanted = formula(*(t.double() for t in (w, left, right, down, up)), scale)
    assert float((fixed.up - wanted).norm() / wanted.norm()) < 1e-5
    assert residual(mismatch, fixed.up) < 1e-5 * residual(mismatch, up.double())
