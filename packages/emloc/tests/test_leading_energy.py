"""Shares of an error that factors take away, against all eigenvalues and against fitted residuals."""

import pytest
import torch

from emloc.compression.menu_choice import price_forms
from emloc.formats.layer_format import GroupShape
from emloc.formats.menu import menu_of
from emloc.linalg.gram import Moments
from emloc.linalg.leading_energy import left_by_rank
from emloc.linalg.rounding import squared_output


def drawn(rows, columns):
    """A weight, and moments with a few expensive inputs."""
    torch.manual_seed(rows + columns)
    x = torch.randn(3 * columns, columns) * torch.exp(torch.randn(columns))
    x[:, :3] *= 6
    return torch.randn(rows, columns) * 0.1, x.T @ x


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(("rows", "columns"), [(40, 90), (90, 40), (7, 7)])
def test_shares_are_those_of_all_eigenvalues(rows, columns, size):
    error, moments = drawn(rows, columns)
    product = error.double() @ moments.double() @ error.double().T
    values = torch.linalg.eigvalsh(product).flip(0)
    ranks = [0, 1, 3, 6]
    expected = [1 - float(values[:rank].sum() / values.sum()) for rank in ranks]
    assert left_by_rank(error * size, moments, 0.0, ranks) == pytest.approx(expected, abs=2e-3)


def test_nothing_is_left_of_nothing_and_of_all():
    error, moments = drawn(12, 20)
    assert left_by_rank(torch.zeros(12, 20), moments, 1.0, [0, 4]) == [1.0, 0.0]
    assert left_by_rank(error, moments, 0.0, [12]) == pytest.approx([0.0], abs=1e-5)


def test_residuals_are_priced_as_they_come_out():
    weight, moments = drawn(128, 256)
    shape = GroupShape(("a",), (128,), 256)
    sums = Moments.of_matrix("input", "a", moments, 768)
    forms = [f for f in menu_of(shape, 2) if f.sizes["bits"] in (2, 3)]
    assert {form.sizes.get("residual_rank", 0) for form in forms} == {0, 8, 16}
    _, _, errors = price_forms(weight, sums, forms)
    made: dict[tuple[int, int], tuple[float, float]] = {}
    for form, predicted in zip(forms, errors):
        fitted = form.format.fit([weight], sums, shape, form)
        stood = form.format.operator(shape, form, "a", lambda *key, f=fitted: f.tensors[key])
        cost = squared_output(weight - stood.dense(torch.float32), moments)
        made[form.sizes["bits"], form.sizes.get("residual_rank", 0)] = cost, predicted
    for (bits, rank), (cost, predicted) in made.items():
        plain, expected = made[bits, 0]
        assert cost / plain == pytest.approx(predicted / expected, rel=0.3), (bits, rank)
        assert rank == 0 or cost < plain


def test_narrow_layers_have_no_residual():
    forms = menu_of(GroupShape(("a",), (63,), 256), 2)
    assert {form.sizes.get("residual_rank", 0) for form in forms} == {0}
