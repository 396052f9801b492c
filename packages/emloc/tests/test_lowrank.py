"""The factorisation against an independent reference: whiten, full SVD, unwhiten, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.errors import NumericalError
from emloc.linalg.gram import Moments, smaller_side
from emloc.linalg.lowrank import factorise


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
        left, right, *_ = factorise(weight, folded(weight, x, side), rank)
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
    left, right, relative_error, excess, *_ = factorise(weight, folded(weight, x), rank)
    measured = ((weight - left @ right) @ x.T).norm() ** 2
    total = (weight @ x.T).norm() ** 2
    assert abs(relative_error**2 - float(measured / total)) <= 1e-9
    assert excess == 0.0


def test_full_rank_gives_the_weight_back():
    for d_out, d_in in ((9, 14), (14, 9)):
        weight, x = problem(d_out, d_in, 50, seed=3)
        left, right, error, *_ = factorise(weight, folded(weight, x), min(d_out, d_in))
        torch.testing.assert_close(left @ right, weight)
        assert error == 0.0


def test_float32_and_bfloat16_weights_stay_near_the_float64_optimum():
    weight, x = problem(24, 40, 200, seed=5)
    best = ((weight - whitened_optimum(weight, x, 10)) @ x.T).norm()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        low, activations = weight.to(dtype), x.float()
        moments = Moments("input", "layer")
        moments.fold(activations)
        left, right, *_ = factorise(low, moments, 10)
        assert left.dtype == dtype
        error = ((weight - left.double() @ right.double()) @ x.T).norm()
        assert error <= best * (1 + tolerance)


def test_better_than_the_plain_svd():
    weight, x = problem(16, 24, 100, seed=7)
    left, right, *_ = factorise(weight, folded(weight, x), 6)
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
    left, right, error, *_ = factorise(torch.randn(6, 4), moments, 2)
    assert error == 0.0
    assert torch.isfinite(left @ right).all()


@pytest.mark.parametrize("shape", [(130, 65), (65, 130), (64, 64)])
def test_a_weight_of_zeros_has_no_error(shape):
    moments = Moments("input", "layer")
    moments.fold(torch.randn(50, shape[1]))
    factors = factorise(torch.zeros(shape), moments, 16)
    assert (factors.relative_error, factors.total) == (0.0, 0.0)


def test_a_stack_is_compressed_as_one_weight():
    for d_out, d_in in ((9, 14), (14, 9)):
        weight, x = problem(d_out, d_in, 50, seed=4)
        whole = factorise(weight, folded(weight, x, "input"), 3)
        parts = factorise(list(weight.split([2, 3, d_out - 5])), folded(weight, x, "input"), 3)
        torch.testing.assert_close(whole.left @ whole.right, parts.left @ parts.right)


@pytest.mark.parametrize(("d_out", "d_in"), [(1100, 1100), (2300, 1050), (1050, 1500)])
def test_large_layers_with_outliers_are_within_a_thousandth_of_the_optimum(
    d_out, d_in, monkeypatch
):
    """Block Lanczos in float32, where plain float32 solvers lose a percent."""
    monkeypatch.setattr("emloc.linalg.eigen.dense_eigenvectors", None)
    torch.manual_seed(1)
    weight = torch.randn(d_out, d_in) * torch.logspace(0, -1, d_in)
    x = torch.randn(1500, d_in) * torch.arange(1, d_in + 1).pow(-0.75)
    x[:, 5] *= 100  # an outlier dimension, as language models have
    y = x.double() @ weight.double().T
    rank = 150
    left, right, error, excess, *_ = factorise(weight, folded(weight, x), rank)
    assert 0 <= excess < 1e-3
    best = torch.linalg.svdvals(y)[rank:].norm()
    found = (y - (x.double() @ right.double().T) @ left.double().T).norm()
    assert best * (1 - 1e-6) <= found <= best * (1 + 1e-3)
    assert error == pytest.approx(float(found / y.norm()), rel=5e-3)


def test_a_large_weight_that_is_not_of_full_rank():
    torch.manual_seed(2)
    weight = torch.randn(1800, 1100)
    weight[:, 200:] = 0  # dead inputs: WᵀW is singular
    x = torch.randn(400, 1100)
    left, right, error, *_ = factorise(weight, folded(weight, x), 260)
    y = x.double() @ weight.double().T
    assert error < 2e-3  # a cancelled sum in float32: what it can resolve
    assert (y - (x.double() @ right.double().T) @ left.double().T).norm() <= 1e-4 * y.norm()


def test_shapes_in_signatures_are_checked_while_testing():
    from jaxtyping import TypeCheckError

    from emloc.linalg.merging import merged_weight

    with pytest.raises(TypeCheckError):
        merged_weight(torch.zeros(3, 4), torch.zeros(2, 5), torch.zeros(3, 2), 1.0, None)
