"""The factorisation against an independent reference: whiten, full SVD, unwhiten, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.errors import NumericalError
from emloc.gram import Moments, smaller_side
from emloc.lowrank import factorise, relative_error


def problem(d_out, d_in, tokens, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.float64)
    # Badly scaled activations, as language models have.
    scale = torch.logspace(0, 3, d_in, dtype=torch.float64)
    x = torch.randn(tokens, d_in, generator=generator, dtype=torch.float64) * scale
    return weight.to(dtype), x.to(dtype)


def whitened_optimum(weight, x, rank):
    """The textbook route: G = S Sᵀ by eigenvalues, truncated SVD of W S, times the inverse of S."""
    values, vectors = torch.linalg.eigh(x.T @ x)
    alive = values > values.max() * 1e-12
    root = vectors[:, alive] * values[alive].sqrt()
    inverse = (vectors[:, alive] / values[alive].sqrt()).T
    u, s, vt = torch.linalg.svd(weight @ root, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vt[:rank] @ inverse


def folded(weight, x, side=None):
    moments = Moments(side or smaller_side(*weight.shape), "layer")
    moments.fold(x if moments.side == "input" else x @ weight.T)
    return moments


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    ("d_out", "d_in", "tokens"),
    [(7, 19, 64), (19, 7, 64), (12, 12, 40), (30, 20, 6), (20, 30, 6), (5, 3, 1)],
)
def test_matches_the_whitened_optimum(d_out, d_in, tokens, side):
    weight, x = problem(d_out, d_in, tokens, seed=d_out * 31 + d_in)
    for rank in (1, 2, min(d_out, d_in) // 2 + 1, min(d_out, d_in)):
        left, right, _ = factorise(weight, folded(weight, x, side), rank)
        ours = ((weight - left @ right) @ x.T).norm()
        best = ((weight - whitened_optimum(weight, x, rank)) @ x.T).norm()
        scale = (weight @ x.T).norm()
        assert ours <= best + 1e-7 * scale
        assert ours >= best - 1e-7 * scale


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 40), st.integers(0, 10**6))
def test_eigenvalue_tail_is_the_measured_error(d_out, d_in, tokens, seed):
    weight, x = problem(d_out, d_in, tokens, seed)
    rank = 1 + seed % min(d_out, d_in)
    left, right, spectrum = factorise(weight, folded(weight, x), rank)
    measured = ((weight - left @ right) @ x.T).norm() ** 2
    total = (weight @ x.T).norm() ** 2
    assert abs(float(spectrum[rank:].sum() - measured)) <= 1e-9 * float(total)
    assert abs(relative_error(spectrum, rank) ** 2 - float(measured / total)) <= 1e-8


def test_full_rank_gives_the_weight_back():
    for d_out, d_in in ((9, 14), (14, 9)):
        weight, x = problem(d_out, d_in, 50, seed=3)
        left, right, spectrum = factorise(weight, folded(weight, x), min(d_out, d_in))
        torch.testing.assert_close(left @ right, weight)
        assert relative_error(spectrum, min(d_out, d_in)) == 0.0


def test_float32_and_bfloat16_weights_stay_near_the_float64_optimum():
    weight, x = problem(24, 40, 200, seed=5)
    best = ((weight - whitened_optimum(weight, x, 10)) @ x.T).norm()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        low, activations = weight.to(dtype), x.float()
        moments = Moments("input", "layer")
        moments.fold(activations)
        left, right, _ = factorise(low, moments, 10)
        assert left.dtype == dtype
        error = ((weight - left.double() @ right.double()) @ x.T).norm()
        assert error <= best * (1 + tolerance)


def test_better_than_the_plain_svd():
    weight, x = problem(16, 24, 100, seed=7)
    left, right, _ = factorise(weight, folded(weight, x), 6)
    u, s, vt = torch.linalg.svd(weight)
    plain = u[:, :6] @ torch.diag(s[:6]) @ vt[:6]
    assert ((weight - left @ right) @ x.T).norm() < 0.9 * ((weight - plain) @ x.T).norm()


def test_nan_names_the_layer():
    weight, x = problem(4, 6, 10, seed=0)
    moments = folded(weight, x)
    weight[2, 3] = float("nan")
    with pytest.raises(NumericalError, match="Layer layer: its weight"):
        factorise(weight, moments, 2)
    with pytest.raises(NumericalError, match="Layer mlp: its inputs hold NaN"):
        Moments("input", "mlp").fold(torch.tensor([[1.0, float("nan")]]))


def test_dead_layer_has_no_error():
    moments = Moments("input", "layer")
    moments.fold(torch.zeros(5, 4))
    left, right, spectrum = factorise(torch.randn(6, 4), moments, 2)
    assert relative_error(spectrum, 2) == 0.0
    assert torch.isfinite(left @ right).all()


def test_shapes_in_signatures_are_checked_while_testing():
    from jaxtyping import TypeCheckError

    from emloc.merging import merged_weight

    with pytest.raises(TypeCheckError):
        merged_weight(torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(3, 2), 1.0, None)
