"""Codes along a trellis: the best of all sequences, and the weights that they stand for."""

import hashlib
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from emloc.compression.groups import Group
from emloc.compression.menu_choice import price_forms
from emloc.formats import trellis_matrix
from emloc.formats.abilities import Prepares
from emloc.formats.layer_format import GroupShape
from emloc.formats.menu import menu_of
from emloc.formats.quantized import QUANTIZED
from emloc.formats.trellis import TRELLIS
from emloc.formats.trellis_residual import TRELLIS_RESIDUAL
from emloc.layers.remade_weight import remade_linear
from emloc.linalg import trellis, trellis_rounding, trellis_search
from emloc.linalg.gram import Moments
from emloc.linalg.refinement import fitted_grid
from emloc.linalg.rounding import squared_output
from emloc.linalg.trellis import least_steps, levels, sequences_of, values_of, windows_of
from emloc.linalg.trellis_rounding import choose_scales, fitted_trellis, trellis_values
from emloc.linalg.trellis_search import (
    best_codes,
    best_path,
    compiled_search,
    follow_column,
    path_by_tensors,
)
from emloc.planning.live import LiveBytes
from emloc.planning.streaming import fitting_bytes
from emloc.testing import pretend_device

BITS = [1, 2, 3, 4]


def plain_windows(codes, bits):
    """The windows of one sequence of whole numbers, by the definition."""
    window = 0
    for code in [*codes, *codes]:  # the second round begins with the end of the first
        window = ((window << bits) | code) & 255
        yield window


def plain_values(codes, bits):
    table = levels(bits).tolist()
    return [table[window] for window in list(plain_windows(codes, bits))[len(codes) :]]


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_quantiles_that_codes_choose_widely_among(bits):
    table = levels(bits)
    assert len(set(table.tolist())) == 256
    torch.testing.assert_close(table.sort().values, -table.sort().values.flip(0))
    followers = table.view(-1, 1 << bits).sort(dim=1).values  # windows that differ in their code
    distances = (followers[:, 1:] - followers[:, :-1]).median()
    assert distances > 0.5 * (table.amax() - table.amin()) / (2 << bits)


def test_levels_stay_what_they_are():
    """Emulators that were written mean other weights with other levels."""
    digests = {
        bits: hashlib.sha256(levels(bits).numpy().tobytes()).hexdigest()[:16] for bits in BITS
    }
    assert digests == {
        1: "a5673cadb05eb7ca",
        2: "a45256d0cf209a47",
        3: "bfc09806a3157d16",
        4: "44f27d7b19c84f00",
    }


@pytest.mark.parametrize("bits", BITS)
def test_windows_bite_their_tails(bits):
    torch.manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (11, 3), dtype=torch.uint8)
    expected = [list(plain_windows(one, bits))[11:] for one in codes.T.tolist()]
    assert windows_of(codes, bits).T.tolist() == expected
    assert torch.equal(windows_of(codes[None], bits)[0], windows_of(codes, bits))


@pytest.mark.parametrize(
    ("bits", "steps"),
    [(1, 7), (1, 8), (1, 11), (2, 3), (2, 4), (2, 7), (3, 2), (3, 5), (4, 1), (4, 3)],
)
def test_no_sequence_is_better(bits, steps):
    """Against all sequences of codes."""
    torch.manual_seed(bits)
    assert steps >= least_steps(bits)
    numbers, weights = torch.randn(steps, 1), torch.rand(steps, 1) + 0.1
    tried = torch.tensor(list(itertools.product(range(1 << bits), repeat=steps)))
    windows = windows_of(tried.T.to(torch.uint8), bits)
    costs = (weights * (numbers - values_of(windows, bits)) ** 2).sum(0)
    ends = windows[-1, costs.argmin()][None]
    path = best_path(numbers, weights, bits, ends)
    assert path[:, 0].tolist() == windows[:, costs.argmin()].tolist()
    codes = best_codes(numbers, weights, bits)
    values = torch.tensor(plain_values(codes[:, 0].tolist(), bits))
    cost = (weights[:, 0] * (numbers[:, 0] - values) ** 2).sum()
    assert cost == pytest.approx(float(costs.min()), rel=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("steps", "count"), [(64, 3), (51, 7), (8, 1), (9, 20)])
def test_the_compiled_search_finds_the_same(bits, steps, count):
    torch.manual_seed(steps + bits)
    numbers, weights = 1.3 * torch.randn(steps, count), torch.rand(steps, count)
    weights[-2:] = 0
    compiled = compiled_search().compiled_path
    ends = torch.randint(0, 256, (count,), dtype=torch.uint8)
    for known in (None, ends):
        expected = path_by_tensors(numbers, weights, bits, known)
        assert torch.equal(compiled(numbers, weights, bits, known), expected)


def check_the_kernel() -> int:
    """Compare the kernel for GPUs with operations on tensors, where Triton is; returns how many searches."""
    from emloc.linalg.trellis_triton import triton_path

    compared = 0
    for bits, steps, count in [(1, 9, 2), (2, 9, 2), (3, 9, 2), (4, 9, 2), (2, 34, 1)]:
        torch.manual_seed(steps + bits)
        numbers, weights = 1.3 * torch.randn(steps, count), torch.rand(steps, count)
        ends = torch.randint(0, 256, (count,), dtype=torch.uint8)
        for known in (None, ends):
            expected = path_by_tensors(numbers, weights, bits, known)
            assert torch.equal(triton_path(numbers, weights, bits, known), expected), (bits, steps)
            compared += 1
    return compared


def test_the_kernel_for_gpus_finds_the_same(in_triton):
    assert in_triton(__file__, "check_the_kernel") == 10


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [9, 33, 70, 128])
def test_without_numba_tensors_find_the_same(bits, rows, monkeypatch):
    torch.manual_seed(rows)
    numbers, weights = torch.randn(rows), torch.rand(rows)
    count, steps = sequences_of(rows)

    def followed():
        windows, values = torch.zeros(steps, count, dtype=torch.uint8), torch.zeros(rows)
        for known in (False, True):
            follow_column(numbers, weights, bits, known, windows, values)
            yield windows.clone(), values.clone()

    expected = list(followed())
    monkeypatch.setattr(trellis_search, "compiled_search", lambda: None)
    costs = []
    for (windows, values), (others, same) in zip(followed(), expected, strict=True):
        assert torch.equal(windows, others)
        assert torch.equal(values, same)
        assert torch.equal(values, values_of(windows, bits).T.flatten()[:rows])
        costs.append(float((weights * (values - numbers) ** 2).sum()))
    assert costs[1] <= costs[0] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("steps", "bits", "error"),
    [(64, 1, 0.31), (64, 2, 0.080), (64, 3, 0.021), (64, 4, 0.0058), (8, 2, 0.1), (20, 3, 0.022)],
)
def test_errors_on_normal_numbers(steps, bits, error):
    """Well below the best grid's (0.363, 0.1175, 0.0345, 0.0095)."""
    numbers = torch.randn(steps, 51200 // steps, generator=torch.Generator().manual_seed(bits))
    ones = torch.ones_like(numbers)
    codes = best_codes(numbers, ones, bits)
    off = float((values_of(windows_of(codes, bits), bits) - numbers).square().mean())
    assert 4.0**-bits < off < error
    again = best_codes(numbers, ones, bits, windows_of(codes, bits))
    assert float((values_of(windows_of(again, bits), bits) - numbers).square().mean()) <= off


@pytest.mark.parametrize(
    ("rows", "count", "steps"), [(8, 1, 8), (64, 1, 64), (65, 2, 33), (576, 9, 64), (1000, 16, 63)]
)
def test_rows_are_cut_into_sequences_of_about_the_same_length(rows, count, steps):
    assert sequences_of(rows) == (count, steps)


def drawn(rows, columns, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=draw) / columns**0.5
    x = torch.randn(600, columns, generator=draw) @ (mixing + torch.eye(columns))
    weight = torch.randn(rows, columns, generator=draw) * 0.03
    return weight, Moments.of_matrix("input", "a", x.T @ x, 600)


def stored(weight, moments, bits, group_size):
    shape = GroupShape(("a",), (weight.shape[0],), weight.shape[1])
    form = TRELLIS.form(bits, group_size)
    fitted = TRELLIS.fit([weight], moments, shape, form)
    return TRELLIS.operator(shape, form, "a", lambda *key: fitted.tensors[key]), fitted


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("rows", "columns", "group"), [(72, 96, 32), (9, 70, 64), (130, 40, 128)])
def test_what_is_stored_stands_for_the_codes(rows, columns, group, bits):
    """Every number by the definition, in whole numbers and float64; and the cost that is told."""
    weight, moments = drawn(rows, columns)
    rounded = fitted_trellis(weight, moments, bits, group)
    operator, fitted = stored(weight, moments, bits, group)
    count, steps = sequences_of(rows)
    blocks = torch.arange(rounded.scales.codes.numel()) // 256
    scales = rounded.scales.codes.double().flatten() * rounded.scales.largest.double()[blocks] / 255
    scales = scales.view(rows, -1)
    expected = torch.zeros(rows, columns, dtype=torch.float64)
    for column in range(columns):
        for sequence in range(count):
            own = rounded.codes[sequence * steps : (sequence + 1) * steps, column].tolist()
            values = torch.tensor(plain_values(own, bits), dtype=torch.float64)
            here = slice(sequence * steps, min((sequence + 1) * steps, rows))
            expected[here, column] = (
                values[: here.stop - here.start] * scales[here, column // group]
            )
    dense = operator.dense(torch.float32)
    torch.testing.assert_close(dense.double(), expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(operator.dense(torch.bfloat16), dense.bfloat16())
    error = weight.double() - expected
    cost = float((error @ moments.matrix.double() * error).sum())
    assert rounded.cost == pytest.approx(cost, rel=1e-4)
    whole = squared_output(weight, moments.matrix)
    assert fitted.report["relative_error"] == pytest.approx((cost / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fewer_bytes_and_a_smaller_error_than_a_grid(bits):
    weight, moments = drawn(256, 256)
    grid = fitted_grid(weight, moments, bits, 64)
    rounded = fitted_trellis(weight, moments, bits, 128)
    assert rounded.cost < 0.75 * grid.cost


@pytest.mark.parametrize("bits", [2, 4])
def test_feedback_and_improving_each_help(bits):
    weight, moments = drawn(64, 128)
    scales = choose_scales(weight, moments.matrix.diagonal(), bits, 128)
    alone = Moments.of_matrix("input", "a", torch.diag(moments.matrix.diagonal()), 600)
    costs = [
        squared_output(weight - trellis_values(weight, how, bits, 128), moments.matrix)
        for how in (alone, moments)
    ]
    assert scales.codes.shape == (64, 1)
    assert fitted_trellis(weight, moments, bits, 128).cost < costs[1] < costs[0]


@pytest.mark.parametrize("ratio", [0.3, 0.01])
def test_outputs_with_small_weights_are_not_lost(ratio):
    """Rows share sequences, so that errors are traded between them."""
    weight, moments = drawn(128, 128)
    weight[::2] *= ratio
    error = weight - stored(weight, moments, 3, 128)[0].dense(torch.float32)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        lost = squared_output(error[rows], moments.matrix)
        assert lost < 0.25 * squared_output(weight[rows], moments.matrix)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e15])
def test_weights_of_any_size(size):
    weight, moments = drawn(40, 64)
    operator, _ = stored(weight * size, moments, 3, 32)
    reference, _ = stored(weight, moments, 3, 32)
    error = (operator.dense(torch.float32) / size - weight).norm() / weight.norm()
    assert error == pytest.approx(
        float((reference.dense(torch.float32) - weight).norm() / weight.norm()), rel=0.05
    )


def test_zeros_constants_and_outliers():
    weight, moments = drawn(48, 96)
    weight[7] = 0.01
    weight[3] = 0
    weight[:, 32:64] = 0
    weight[9, 5] = 30.0
    weight[11, 64:] = 0.02
    dense = stored(weight, moments, 4, 32)[0].dense(torch.float32)
    assert torch.isfinite(dense).all()
    assert not dense[3].any()
    assert not dense[:, 32:64].any()
    assert dense[9, 5] == pytest.approx(30.0, rel=0.15)  # as far as its group's scale reaches
    assert dense[20, :32] == pytest.approx(weight[20, :32], abs=0.02)
    dead = Moments.of_matrix("input", "a", torch.zeros(96, 96), 600)
    assert torch.isfinite(stored(weight, dead, 2, 128)[0].dense(torch.float32)).all()


def test_products_and_gradients_are_the_dense_ones():
    weight, moments = drawn(24, 70)
    operator, _ = stored(weight, moments, 3, 32)
    dense = operator.dense(torch.float32)
    x = torch.randn(5, 70, requires_grad=True)
    y = remade_linear(x, lambda codes: operator.dense(x.dtype), None, operator.packed)
    y.square().sum().backward()
    other = x.detach().clone().requires_grad_()
    (other @ dense.T).square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    columns = torch.randn(70, 4, dtype=torch.float64)
    torch.testing.assert_close(operator @ columns, dense.double() @ columns)


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (128, 512), (512, 128)])
def test_fitting_and_pricing_take_what_is_planned(rows, columns):
    weight, moments = drawn(rows, columns)
    shape = GroupShape(("a",), (rows,), columns)
    menu = menu_of(shape, 4)
    group = Group(shape, TRELLIS.form(2, 128), menu=(tuple(menu),))
    for form in (TRELLIS.form(2, 128), TRELLIS_RESIDUAL.form(2, 128, 8, 8)):
        moments.derived.clear()
        with LiveBytes() as live:
            form.format.fit([weight], moments, shape, form)
        planned = form.format.fitting_bytes(shape, form, 4)
        assert 0.4 * planned < live.peak.total <= planned, form.sizes
    moments.derived.clear()
    with LiveBytes() as live:
        price_forms(weight, moments, menu)
    assert live.peak.total <= fitting_bytes(group, 4)


def test_an_output_without_weights_does_not_count():
    """Its neighbours in a sequence choose as if it were not there."""
    units = trellis_rounding._Units.of(torch.tensor([0.0, 1.0, 1e-6, 0.5]))
    assert units.weights[0] == 0
    assert units.inverse[0] == 0
    a_tenth_of_the_mean = 0.1 * (1 + 1e-6 + 0.5) / 3
    assert units.weights[2] == pytest.approx(a_tenth_of_the_mean**2, rel=1e-4)


@pytest.mark.parametrize("rows", [12, 70])
def test_a_device_finds_the_same_as_the_cpu(rows):
    """In tensors, where there is no kernel; levels come from the CPU, wherever they are asked for first."""
    weight, moments = drawn(rows, 40)
    expected = fitted_trellis(weight, moments, 2, 32)
    trellis._TABLES.clear()
    with pretend_device():
        there = Moments.of_matrix("input", "a", moments.matrix.to("cuda"), 600)
        made = fitted_trellis(weight.to("cuda"), there, 2, 32)
        codes, scales = made.codes.cpu(), made.scales.codes.cpu()
    assert torch.equal(codes, expected.codes)
    assert torch.equal(scales, expected.scales.codes)
    assert all(type(table) is torch.Tensor for table in trellis._TABLES.values())
    assert {device.type for _, device in trellis._TABLES} <= {"cpu"}  # the device's ended with it


def test_a_backward_may_be_the_first_to_ask_for_levels():
    """Modes that stand in for a device see operations there, and no calls that make tensors on it."""
    weight, moments = drawn(24, 40)
    operator, _ = stored(weight, moments, 4, 32)
    with pretend_device():
        there = replace(operator, **{
            name: getattr(operator, name).to("cuda") for name in ("packed", "scale_codes", "largest")
        })  # fmt: skip
        x = torch.randn(3, 40).to("cuda").requires_grad_()
        y = remade_linear(x, lambda codes: there.dense(x.dtype), None, there.packed)
        trellis._TABLES.clear()
        y.square().sum().backward()
        gradient, sides = x.grad.cpu(), (x.detach().cpu(), operator.dense(torch.float32))
    torch.testing.assert_close(gradient, 2 * sides[0] @ sides[1].T @ sides[1])


@pytest.fixture
def cuda_build(monkeypatch):
    """A pretended device in a build that says that it is CUDA's, with a kernel that `problems` decides on."""
    problems, searched = [], []

    def triton_path(*given):
        searched.append(given[2])
        if problems:
            raise problems[-1]
        return path_by_tensors(*given)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    kernel = SimpleNamespace(triton_path=triton_path)
    monkeypatch.setitem(sys.modules, "emloc.linalg.trellis_triton", kernel)
    trellis_search._triton_search.cache_clear()
    with pretend_device():
        yield problems, searched
    trellis_search._triton_search.cache_clear()


def test_a_gpu_searches_with_the_kernel_where_it_runs(cuda_build):
    problems, searched = cuda_build
    numbers = torch.randn(20, 2).to("cuda")
    expected = best_path(numbers.cpu(), torch.ones(20, 2), 2, None)
    assert torch.equal(best_path(numbers, torch.ones_like(numbers), 2, None).cpu(), expected)
    assert searched == [1, 2, 3, 4, 2]  # each once to see whether it runs
    trellis_search._triton_search.cache_clear()
    problems.append(RuntimeError("Failed to find C compiler"))
    for _ in range(2):
        assert torch.equal(best_path(numbers, torch.ones_like(numbers), 2, None).cpu(), expected)
    assert searched == [1, 2, 3, 4, 2, 1]  # found out once
    trellis_search._triton_search.cache_clear()
    problems.append(torch.cuda.OutOfMemoryError("no room"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        best_path(numbers, torch.ones_like(numbers), 2, None)


def test_without_numba_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr(trellis_matrix, "compiled_search", lambda: None)
    monkeypatch.setattr(trellis_search, "compiled_search", lambda: None)
    trellis_matrix._say_numba.cache_clear()
    weight, moments = drawn(8, 10)
    for format in (TRELLIS, TRELLIS_RESIDUAL):
        sizes = (2, 32) if format is TRELLIS else (2, 32, 1, 16)
        format.fit([weight], moments, GroupShape(("a",), (8,), 10), format.form(*sizes))
    assert capsys.readouterr().err.count("emloc[numba]") == 1
    trellis_matrix._say_numba.cache_clear()


def test_what_cannot_be_kept_on_disk_is_compiled_all_the_same(monkeypatch):
    """Numba refuses where neither the package's folder nor the user's may be written."""
    compiled = compiled_search()
    real = compiled.numba.njit

    def njit(*given, **options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(*given, **options)

    monkeypatch.setattr(compiled.numba, "njit", njit)
    compiled._functions.cache_clear()
    numbers = torch.randn(40, 2)
    path = compiled.compiled_path(numbers, torch.ones(40, 2), 2, None)
    assert torch.equal(path, path_by_tensors(numbers, torch.ones(40, 2), 2, None))
    compiled._functions.cache_clear()


def test_only_formats_along_a_trellis_compile_beforehand(monkeypatch):
    asked = []
    monkeypatch.setattr(trellis_search, "follow_column", lambda *given: asked.append(given[2]))
    assert isinstance(TRELLIS, Prepares)
    assert isinstance(TRELLIS_RESIDUAL, Prepares)
    assert not isinstance(QUANTIZED, Prepares)
    TRELLIS.prepare(torch.device("cpu"))
    assert asked == BITS
    TRELLIS_RESIDUAL.prepare(torch.device("cuda"))
    assert asked == BITS
