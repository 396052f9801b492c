"""Refining a rounded weight against the same steps written out one by one in float64."""

import pytest
import torch

from emloc.linalg.grid import choose_grid, decoded_scales
from emloc.linalg.refinement import improved


def drawn(rows, columns, bits, size):
    torch.manual_seed(columns + bits)
    inputs = torch.randn(500, columns) @ (torch.randn(columns, columns) * 0.1)
    weight = torch.randn(rows, columns) * 0.05
    moments = inputs.T @ inputs
    grid = choose_grid(weight, moments.diagonal(), bits, size)
    codes = torch.randint(0, grid.levels + 1, weight.shape).to(torch.uint8)
    return weight, moments, grid, codes


def cost(weight, moments, grid, codes):
    error = (weight - grid.values(codes)).double()
    return (error @ moments.double() * error).sum(1)


def plain(weight, moments, grid, codes):
    """Each scale, then each code of its group, by trying all that it may be."""
    weight, moments, codes = weight.double(), moments.double(), codes.double()
    unit = decoded_scales(torch.ones_like(grid.scale_codes), grid.largest).double()
    scales, zeros = grid.scale_codes.double(), grid.zeros.double()
    groups = torch.arange(weight.shape[1]) // grid.group_size

    def costs():
        error = weight - (codes - zeros[:, groups]) * (scales * unit)[:, groups]
        return (error @ moments * error).sum(1)

    def take_best(number, values):
        tried = []
        for value in values:
            number.copy_(value)
            tried.append(costs())
        number.copy_(values[torch.stack(tried).argmin(0)])

    for group in range(scales.shape[1]):
        take_best(scales[:, group], torch.arange(1, 256, dtype=torch.float64))
        for column in (groups == group).nonzero()[:, 0].tolist():
            take_best(codes[:, column], torch.arange(grid.levels + 1, dtype=torch.float64))
    return scales, codes


@pytest.mark.parametrize(("columns", "bits", "size"), [(70, 2, 32), (150, 3, 64), (40, 4, 8)])
def test_every_step_is_the_best_of_all_that_can_be_stored(columns, bits, size):
    weight, moments, grid, codes = drawn(6, columns, bits, size)
    better, given, left = improved(weight, moments, 0.0, grid, codes)
    scales, expected = plain(weight, moments, grid, codes)
    assert float((given == expected).double().mean()) > 0.99  # ties, in float32
    assert float((better.scale_codes == scales).double().mean()) > 0.99
    costs = cost(weight, moments, better, given)
    assert (costs < cost(weight, moments, grid, codes)).all()
    assert left == pytest.approx(float(costs.sum()), rel=1e-5)


def test_a_ridge_counts_as_moments():
    weight, moments, grid, codes = drawn(9, 96, 3, 32)
    ridge = float(moments.diagonal().mean())
    ridged = moments + ridge * torch.eye(96)
    ours, theirs = (improved(weight, m, r, grid, codes) for m, r in ((moments, ridge), (ridged, 0)))
    assert float((ours.codes == theirs.codes).double().mean()) > 0.99
    expected = float(cost(weight, moments, ours.grid, ours.codes).sum())
    assert ours.cost == pytest.approx(expected, rel=1e-5)


def test_groups_of_zeros_stay_zero():
    weight, moments, _, codes = drawn(4, 64, 4, 32)
    weight[1], weight[2, 32:] = 0, 0
    grid = choose_grid(weight, moments.diagonal(), 4, 32)
    better, given, _ = improved(weight, moments, 0.0, grid, codes)
    assert torch.equal(better.scale_codes == 0, grid.scale_codes == 0)
    assert torch.equal(better.values(given)[weight == 0], torch.zeros(64 + 32))
