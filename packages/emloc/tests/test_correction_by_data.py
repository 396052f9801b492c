"""The fit of a LoRA to the data against least squares written out directly, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emloc.correction.adapter_correction import _halves
from emloc.correction.reads import Reads
from emloc.correction.ways import UNCORRECTED, Way, best_way
from emloc.errors import NumericalError
from emloc.extend.losses import LossSum
from emloc.linalg.correction import correct_up, data_basis, measure, residual
from emloc.linalg.operator import Matrix


def drawn(d_out, d_in, r, tokens, seed):
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x = random(tokens, d_in) @ random(d_in, d_in) * random(d_in).exp()
    return random(d_out, d_in), random(d_out, d_in), random(r, d_in), random(d_out, r), x


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(2, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_it_is_the_least_squares_fit_on_what_the_lora_reads(d_out, d_in, r, seed):
    r = min(r, d_in)
    weight, emulated, down, up, x = drawn(d_out, d_in, r, 3 * d_in + 5, seed)
    z = x @ down.T
    mismatch = measure(weight, Matrix(emulated), data_basis(down, x.T @ z), up, 0.7)
    corrected = correct_up(mismatch, None)
    wanted = x @ (emulated - weight).T  # what the outputs lack
    best = torch.linalg.lstsq(z, wanted).solution.T
    change = 0.7 * (corrected.up - up)
    if torch.linalg.cond(z) < 100:
        torch.testing.assert_close(change, best, rtol=1e-5, atol=1e-5)
    # Directions in which hardly anything is read are left alone, so at most their share is lost.
    assert (z @ (change - best).T).norm() <= 1e-2 * wanted.norm()
    # Of the residual the part that A can reach is gone; half of the way, half of it is left.
    before = residual(mismatch, up)
    assert before == pytest.approx(float((z @ best.T).norm()), rel=1e-2)
    assert corrected.residual <= 1e-6 * (1 + before)
    assert correct_up(mismatch, None, 0.5).residual == pytest.approx(before / 2, rel=1e-6)


def test_no_fit_to_other_data_is_better():
    weight, emulated, down, up, x = drawn(7, 9, 3, 60, 1)

    def lost(b):
        return float((x @ (emulated + up @ down - weight - b @ down).T).norm())

    z = x @ down.T
    mismatch = measure(weight, Matrix(emulated), data_basis(down, x.T @ z), up, 1.0)
    fitted = correct_up(mismatch, None).up
    for _ in range(20):
        assert lost(fitted) <= lost(fitted + 1e-3 * torch.randn_like(fitted))
    assert lost(fitted) < lost(up)


@pytest.mark.parametrize("case", ["no data", "a dead row", "one sample"])
def test_what_data_do_not_tell_changes_nothing(case):
    weight, emulated, down, up, x = drawn(5, 8, 3, 40, 2)
    if case == "no data":
        x = x * 0
    elif case == "a dead row":
        down[1] = 0
    else:
        x = x[:1]
    z = x @ down.T
    mismatch = measure(weight, Matrix(emulated), data_basis(down, x.T @ z), up, 0.5)
    corrected = correct_up(mismatch, None).up
    assert torch.isfinite(corrected).all()
    if case == "no data":
        assert torch.equal(corrected, up)
    if case == "a dead row":
        torch.testing.assert_close(corrected[:, 1], up[:, 1])
    error = 0.5 * z @ (corrected - up).T - x @ (emulated - weight).T
    if case == "one sample":
        assert error.norm() < 1e-6 * (x @ (emulated - weight).T).norm()


def test_the_best_on_one_half_must_not_be_worse_than_none_on_the_other():
    ways = [UNCORRECTED, Way(1.0), Way(None, 0.5)]
    assert best_way(ways, [2.0, 1.9, 1.8], [2.0, 2.1, 1.9]) == Way(None, 0.5)
    assert best_way(ways, [2.0, 1.9, 1.8], [2.0, 1.9, 2.1]) == UNCORRECTED
    assert best_way(ways, [2.0, 2.0, 2.0], [2.0, 1.0, 1.0]) == UNCORRECTED
    assert [way.shown for way in (*ways, Way(None))] == ["0", "1", "data 0.5", "none"]


def test_sums_of_a_layer_are_taken_once(tmp_path):
    """A layer keeps its own sum, whatever else is closed, until all are forgotten."""
    draw = torch.Generator().manual_seed(0)
    reads = Reads(tmp_path, {"a", "b"}, calls=2)
    rows = {name: torch.randn(9, 4, generator=draw) for name in "abc"}
    for name in ("a", "b"):
        assert reads.wants(name, 0)
        reads.fold(name, rows[name], rows[name][:, :2])
        reads.close(name)
    assert not reads.wants("c", 0)  # it stays as it is
    assert not reads.wants("a", 0)
    for name in ("b", "a"):
        reads.close(name)
    for name in ("a", "b"):
        torch.testing.assert_close(reads.crossed(name), rows[name].T @ rows[name][:, :2])
    assert reads.crossed("c") is None
    assert [reads.has(name) for name in "abc"] == [True, True, False]
    reads.forget()
    assert reads.wants("a", 0)
    assert not list(tmp_path.iterdir())
    for name in ("a", "b"):
        reads.fold(name, rows[name], rows[name][:, :2])
    reads.close_all()
    torch.testing.assert_close(reads.crossed("b"), rows["b"].T @ rows["b"][:, :2])
    assert Reads(tmp_path, {"a"}, calls=1).wants("a", 0)
    assert not Reads(tmp_path, {"a"}, calls=1).wants("a", 1)


def test_inputs_that_are_no_numbers_are_named(tmp_path):
    reads = Reads(tmp_path, {"a"}, calls=1)
    reads.fold("a", torch.full((3, 4), torch.nan), torch.ones(3, 2))
    with pytest.raises(NumericalError, match="Layer a: its inputs hold NaN"):
        reads.close("a")


def test_a_half_without_labels_does_not_end_the_choice():
    losses = [LossSum(3.0, 2), LossSum(0.0, 0)]
    first, other, every = _halves(losses, 1)
    assert losses[first] == losses[other] == losses[every] == losses
    losses[1] = LossSum(1.0, 1)
    assert [losses[part] for part in _halves(losses, 1)] == [losses[:1], losses[1:], losses]
    assert [losses[:1][part] for part in _halves(losses[:1], 1)] == [losses[:1]] * 3
