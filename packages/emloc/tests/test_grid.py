"""Grids of few bits: scales and zeros as they are stored, and what they cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.linalg.grid import choose_grid, decoded_scales, encode_scales, group_count


def nearest(grid, weight):
    """Every weight by itself, in float64, tried against all levels of its group."""
    scales, zeros = grid.scales.double(), grid.zeros.double()
    columns = torch.arange(weight.shape[1]) // grid.group_size
    levels = torch.arange(grid.levels + 1, dtype=torch.float64)
    values = (levels - zeros[:, columns, None]) * scales[:, columns, None]
    return values.gather(2, (values - weight.double()[..., None]).abs().argmin(2)[..., None])[
        ..., 0
    ]


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([8, 32, 128]),
    columns=st.integers(1, 150),
    seed=st.integers(0, 99),
    scale=st.sampled_from([1e-42, 1e-33, 1e-20, 1e-3, 1.0, 1e20, 3e37]),
)
def test_every_weight_is_near_a_level(bits, group_size, columns, seed, scale):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed)) * scale
    grid = choose_grid(weight, torch.ones(columns), bits, group_size)
    assert grid.scale_codes.shape == (5, group_count(columns, group_size))
    error = (nearest(grid, weight) - weight).abs()
    # The widest grid that is tried reaches all weights within half a step; the chosen one is no worse in sum.
    low, high = weight.clamp(max=0).amin(1), weight.clamp(min=0).amax(1)
    step = (high - low) / grid.levels
    zero_off = 0.5 * max(1, grid.levels / 15) + 0.01 * grid.levels
    bound = columns * ((0.5 + zero_off) * step.max().double().clamp(min=1e-36 * grid.levels)) ** 2
    assert grid.scales.isfinite().all()
    assert grid.by_group()[1].isfinite().all()
    assert float(error.square().sum(1).max()) <= float(bound)


def test_groups_of_zeros_and_rows_of_zeros_stay_zero():
    weight = torch.randn(6, 100)
    weight[2] = 0
    weight[4, 32:64] = 0
    grid = choose_grid(weight, torch.ones(100), 3, 32)
    assert torch.equal(nearest(grid, weight)[weight == 0], torch.zeros(100 + 32).double())
    assert (grid.scales[torch.arange(6) != 2][:, [0, 2, 3]] > 0).all()


def test_an_outlier_is_not_clipped_when_its_input_matters():
    torch.manual_seed(0)
    weight = torch.randn(1, 64)
    weight[0, 7] = 12.0
    importance = torch.ones(64)
    clipped = nearest(choose_grid(weight, importance, 2, 64), weight)[0, 7]
    importance[7] = 1e4
    kept = nearest(choose_grid(weight, importance, 2, 64), weight)[0, 7]
    assert abs(kept - 12) < abs(clipped - 12)


def test_the_least_error_of_all_shrunken_ranges_is_taken():
    """Against every pair of a scale and a zero on a fine lattice, with the search's own freedom."""
    torch.manual_seed(1)
    weight, importance = torch.randn(3, 16), torch.rand(16)
    grid = choose_grid(weight, importance, 3, 16)
    chosen = (nearest(grid, weight) - weight).square() @ importance.double()
    for row in range(3):
        low, high = float(weight[row].clamp(max=0).min()), float(weight[row].clamp(min=0).max())
        best = min(
            float(_cost(weight[row], importance, (high - low) * share / 7, low * share))
            for share in torch.linspace(0.4, 1, 13).tolist()
        )
        assert float(chosen[row]) <= 1.02 * best  # scales of 8 bits


def _cost(row, importance, scale, low):
    zero = round(-low / scale / (7 / 15)) * (7 / 15)
    codes = (row.double() / scale + zero).round().clamp(0, 7)
    return ((codes - zero) * scale - row.double()).square() @ importance.double()


@pytest.mark.parametrize("shape", [(3, 7), (40, 20)])
def test_scales_are_stored_within_half_a_code(shape):
    scales = torch.rand(shape) ** 4
    codes, largest = encode_scales(scales)
    back = decoded_scales(codes, largest)
    flat, stored = scales.flatten().split(256), back.flatten().split(256)
    for block, one in zip(flat, stored):
        assert float((block - one).abs().max()) <= float(block.max()) / 255 * (1 + 1e-5)
    assert (back > 0).all()
