"""Rounding with feedback against GPTQ written out plainly in float64."""

import pytest
import torch

from emloc.linalg.grid import choose_grid
from emloc.linalg.rounding import DAMPING, Feedback, squared_output


def drawn(rows, columns, tokens=2000):
    torch.manual_seed(columns)
    mixing = torch.randn(columns, columns) * 0.1
    inputs = torch.randn(tokens, columns) * torch.randn(columns).exp() @ mixing
    inputs += 0.3 * torch.randn(tokens, columns)
    return torch.randn(rows, columns) * 0.05, inputs


def plain_gptq(weight, moments, grid):
    """The inverse of the damped moments by Cholesky, one column after another (arXiv 2210.17323)."""
    weight, moments = weight.double(), moments.double()
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    weight, moments = weight[:, order].clone(), moments[order][:, order]
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(moments), upper=True)
    columns = order // grid.group_size
    scales, zeros = grid.scales.double()[:, columns], grid.zeros.double()[:, columns]
    codes = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        codes[:, j] = (weight[:, j] / scales[:, j] + zeros[:, j]).round().clamp(0, grid.levels)
        error = (weight[:, j] - (codes[:, j] - zeros[:, j]) * scales[:, j]) / upper[j, j]
        weight[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return codes[:, torch.argsort(order)]


@pytest.mark.parametrize(("rows", "columns", "bits", "size"),
                         [(40, 300, 4, 64), (25, 131, 3, 32), (30, 260, 2, 128)])  # fmt: skip
def test_the_codes_are_those_of_gptq(rows, columns, bits, size):
    weight, inputs = drawn(rows, columns)
    moments = inputs.T @ inputs
    grid = choose_grid(weight, moments.diagonal(), bits, size)
    codes = Feedback(moments).round(weight, grid)
    error = weight - grid.values(codes)
    expected = plain_gptq(weight, moments, grid)
    assert float((codes == expected).double().mean()) > 0.999  # ties, in float32
    reference = (weight - grid.values(expected)) @ inputs.T
    given = error @ inputs.T
    assert float(given.norm()) == pytest.approx(float(reference.norm()), rel=1e-3)
    nearest = (weight / grid._by_column(grid.scales) + grid._by_column(grid.zeros)).round()
    plain = weight - grid.values(nearest.clamp(0, grid.levels))
    assert given.norm() < 0.7 * (plain @ inputs.T).norm()
    assert squared_output(error, moments) == pytest.approx(float(given.square().sum()), rel=1e-3)


@pytest.mark.parametrize(
    "case", ["few samples", "a dead input", "no samples' worth", "a huge input"]
)
def test_moments_that_have_no_inverse_do_no_harm(case):
    weight, inputs = drawn(20, 96)
    if case == "few samples":
        inputs = inputs[:5]
    elif case == "a dead input":
        inputs[:, 17] = 0
    elif case == "no samples' worth":
        inputs = inputs * 0
    else:
        inputs[:, 3] *= 1e6
    moments = inputs.T @ inputs
    grid = choose_grid(weight, moments.diagonal(), 4, 32)
    codes = Feedback(moments).round(weight, grid)
    error = weight - grid.values(codes)
    assert torch.isfinite(error).all()
    assert float(error.abs().max()) < 1.0
    assert squared_output(error, moments) <= 0.04 * squared_output(weight, moments)


def test_a_weight_on_its_grid_is_given_back():
    torch.manual_seed(0)
    weight, inputs = drawn(12, 64)
    grid = choose_grid(weight, torch.ones(64), 4, 32)
    on_grid = grid.values(torch.randint(0, 16, (12, 64)))
    codes = Feedback(inputs.T @ inputs).round(on_grid, grid)
    torch.testing.assert_close(on_grid - grid.values(codes), torch.zeros(12, 64), atol=1e-6, rtol=0)
