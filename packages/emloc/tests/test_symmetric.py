"""Half-work products against the plain ones in float64."""

import pytest
import torch

from emloc.linalg.gram import Moments
from emloc.linalg.symmetric import add_gram, between_upper, mirror_upper, times_upper


@pytest.mark.parametrize(("rows", "size"), [(5, 7), (300, 700), (64, 256), (10, 2100)])
def test_gram_and_triangular_products(rows, size):
    x = torch.randn(rows, size, dtype=torch.float64)
    total = torch.zeros(size, size, dtype=torch.float64)
    add_gram(total, x)
    add_gram(total, 2 * x)
    mirror_upper(total)
    torch.testing.assert_close(total, 5 * x.T @ x)
    assert torch.equal(total, total.T)
    upper = torch.randn(size, size, dtype=torch.float64).triu()
    torch.testing.assert_close(times_upper(x, upper), x @ upper)
    torch.testing.assert_close(between_upper(upper, total), upper @ total @ upper.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moments_are_summed_in_float32(dtype):
    moments = Moments("input", "layer")
    parts = [torch.randn(500, 700).to(dtype) for _ in range(3)]
    for part in parts:
        moments.fold(part)
    exact = sum(part.double().T @ part.double() for part in parts)
    assert moments.matrix.dtype == torch.float32
    assert (moments.matrix - exact).norm() <= 1e-6 * exact.norm()
    assert moments.tokens == 1500
