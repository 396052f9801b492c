"""Errors of low rank weighed by the loss's gradients: the pass against autograd on the whole model, the fit
against the optimum in float64."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from own_families import installed
from safetensors import safe_open

import emloc
from emloc.compression.menu_choice import _by_gradients
from emloc.errors import ConfigError
from emloc.extend.plugins import family_named
from emloc.formats.layer_format import Form, GroupShape
from emloc.formats.quantized_residual import QUANTIZED_RESIDUAL
from emloc.linalg.gram import Moments
from emloc.linalg.lowrank import factorise
from emloc.linalg.rounding import squared_change
from emloc.linalg.row_weights import FULL_BELOW, RIDGE, RowWeights, row_weights_bytes


def psd(size, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    part = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    return part @ part.T


def cost(weight, made, inputs, gradients):
    error = weight - made
    return float(torch.einsum("ij,jk,lk,li->", error, inputs, error, gradients))


def regularised(gradients):
    mean = gradients.diagonal().mean()
    return gradients / mean + RIDGE * torch.eye(len(gradients), dtype=torch.float64)


@settings(max_examples=25)
@given(
    st.integers(2, 12), st.integers(2, 12), st.integers(1, 4), st.sampled_from(["input", "output"]),
    st.integers(0, 9),
)  # fmt: skip
def test_the_fit_is_the_optimum_under_both_moments(d_out, d_in, rank, side, seed):
    """The closed form by two dense roots and one SVD (Eckart and Young)."""
    weight = psd(max(d_out, d_in), 3, seed + 50)[:d_out, :d_in] + torch.eye(d_out, d_in).double()
    inputs, gradients = psd(d_in, d_in + 2, seed), psd(d_out, 2, seed + 9)
    moments = inputs if side == "input" else weight @ inputs @ weight.T
    given = Moments.of_matrix(side, "layer", moments, 1)
    given.rows = RowWeights.of([gradients])
    rank = min(rank, d_out, d_in)
    made = factorise(weight, given, rank)
    minded = regularised(gradients)
    left, right = torch.linalg.cholesky(minded).T, torch.linalg.cholesky(inputs)
    s = torch.linalg.svdvals(left @ weight @ right)
    best = float(s[rank:].square().sum())
    reached = cost(weight, made.left @ made.right, inputs, minded)
    scale = float(s.square().sum())
    assert reached == pytest.approx(best, rel=1e-6, abs=1e-9 * scale)
    assert made.relative_error**2 == pytest.approx(best / scale, rel=1e-5, abs=1e-9)


def test_a_diagonal_and_a_stack_weigh_each_part():
    full, diagonal = psd(4, 4, 0), torch.rand(5, dtype=torch.float64)
    weights, rows = RowWeights.of([full, diagonal]), torch.randn(9, 3, dtype=torch.float64)
    assert weights.rows == 9
    torch.testing.assert_close(weights.unweigh(weights.weigh(rows)), rows)
    mean = (full.diagonal().sum() + diagonal.sum()) / 9
    whole = torch.block_diag(full / mean, torch.diag(diagonal / mean))
    whole += RIDGE * torch.eye(9, dtype=torch.float64)
    eye = torch.eye(9, dtype=torch.float64)
    torch.testing.assert_close(weights.weigh(eye) @ weights.weigh(eye), whole)


def test_the_bytes_that_are_planned_are_those_that_are_held():
    weights = RowWeights.of([psd(7, 7, 0), torch.rand(5, dtype=torch.float64)])
    held = sum(one.nbytes for one in (*weights.roots, *weights.inverses))
    in_making = 3 * 8 * 7**2
    # A diagonal stands for so many outputs that no test makes them.
    assert row_weights_bytes([7]) + 5 * 16 == held + in_making
    assert row_weights_bytes([FULL_BELOW]) == 16 * FULL_BELOW


def test_without_gradients_all_outputs_count_alike():
    weights = RowWeights.of([torch.zeros(3, 3), torch.zeros(2)])
    rows = torch.randn(5, 4)
    torch.testing.assert_close(weights.unweigh(weights.weigh(rows)), rows)
    ratio = weights.weigh(rows) / rows
    torch.testing.assert_close(ratio, ratio[:1, :1].expand(5, 4))


@pytest.fixture(scope="module", params=["llm", "vlm", "diffusion", "text-to-text"])
def example(request, tmp_path_factory):
    with installed(request.param):
        family = family_named(request.param)
        options = family.write_example(tmp_path_factory.mktemp(request.param), seed=0)
        few = {"num_calibration_samples": 4, "calibration_batch_size": 2}
        yield family, {**options, "device": "cpu", **few}


def test_moments_are_those_of_autograd_on_the_whole_model(example, tmp_path, monkeypatch):
    from emloc.artefacts.checkpoint import Checkpoint
    from emloc.compression import output_gradients
    from emloc.config import CompressConfig
    from emloc.extend.capabilities import native_of
    from emloc.extend.plugin_options import with_family_options

    family, options = example
    kept = {}
    of = output_gradients.OutputGradients.of

    def seen(gradients, group):
        with safe_open(gradients.paths[gradients._block_of[group.owner]], "pt") as stored:
            kept.update({name: stored.get_tensor(name) for name in group.layers})
        return of(gradients, group)

    monkeypatch.setattr(output_gradients.OutputGradients, "of", seen)
    emulator = emloc.compress(
        output_dir=tmp_path / "emulator", format="low_rank", weigh_errors="gradients", **options
    )
    assert not list(emulator.glob("gradients-*"))
    checkpoint = native_of(family, Checkpoint.open(options["model_name_or_path"]))
    config = with_family_options(CompressConfig, family)(output_dir="x", **options)
    model = family.load(checkpoint, "float32", "cpu")
    sums = {name: 0.0 for name in kept}

    def watching(name):
        def watch(module, _, output):
            output.requires_grad_() if not output.requires_grad else None
            output.register_hook(lambda gradient: add(name, module, gradient))

        return watch

    def add(name, module, gradient):
        rows = gradient.movedim(-3, -1) if isinstance(module, torch.nn.Conv2d) else gradient
        rows = rows.reshape(-1, rows.shape[-1])
        sums[name] = sums[name] + rows.T @ rows

    for name in kept:
        model.get_submodule(name).register_forward_hook(watching(name))
    for batch in family.calibration_batches(checkpoint, config):
        family.loss(model, batch)[0].backward()
    assert kept
    for name, moments in kept.items():
        scale = float(sums[name].abs().max())
        torch.testing.assert_close(moments, sums[name], rtol=1e-3, atol=1e-4 * scale)


FORMS = {
    "low rank": {"format": "low_rank", "keep_ratio": 0.3},
    "factors in few bits": {"format": "coded_low_rank", "bits_per_weight": 3.0},
    "residual": {"format": "quantized_residual", "bits": 2, "residual_rank": 3},
    "auto": {"format": "auto", "bits_per_weight": 3.5},
}


@pytest.mark.parametrize(
    ("family", "form"),
    [*(("llm", form) for form in FORMS), ("vlm", "auto"), ("diffusion", "low rank")],
)
def test_the_emulator_is_another_one_and_the_same_whenever_it_is_made(family, form, tmp_path):
    options = family_named(family).write_example(tmp_path, seed=0)
    few = {"num_calibration_samples": 4, "calibration_batch_size": 2, "device": "cpu"}
    options = {**options, **few, **FORMS[form]}
    made = [
        emloc.compress(output_dir=tmp_path / name, weigh_errors=how, **options)
        for name, how in (("alike", "alike"), ("one", "gradients"), ("again", "gradients"))
    ]
    alike, weighed, again = (json.loads((folder / "emloc.json").read_text()) for folder in made)
    assert weighed["settings"]["weigh_errors"] == "gradients"
    assert "weigh_errors" not in alike["settings"]
    digests = [m["summary"]["emulator_digest"] for m in (alike, weighed, again)]
    assert digests[0] != digests[1] == digests[2]
    assert not [path for path in made[1].iterdir() if path.name.startswith(("menu-", "gradients-"))]


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 20), st.integers(3, 70), st.integers(0, 99))
def test_a_residual_costs_the_loss_less_when_it_heeds_it(d_out, d_in, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(d_out, d_in, generator=generator) for _ in range(2)]
    inputs, gradients = psd(d_in, d_in + 3, seed), [psd(d_out, 1, seed + k) for k in (1, 2)]
    shape = GroupShape(("a", "b"), (d_out, d_out), d_in)
    form = Form(
        QUANTIZED_RESIDUAL, {"bits": 2, "group_size": 64, "residual_rank": 1, "factor_bits": 16}
    )
    rows, costs = RowWeights.of(gradients), []
    for weighed in (False, True):
        moments = Moments.of_matrix("input", "layers", inputs.float(), 9)
        moments.rows = rows if weighed else None
        stored = QUANTIZED_RESIDUAL.fit(weights, moments, shape, form).tensors
        moments.rows = rows
        lost = 0.0
        for number, (layer, weight) in enumerate(zip(shape.layers, weights)):
            layout = QUANTIZED_RESIDUAL.layout(d_out, d_in, form)
            own = {name: tensor for (one, name), tensor in stored.items() if one == layer}
            error = weight - layout.decoded(own.__getitem__).dense(torch.float32)
            lost += squared_change(error, moments.for_layer(number))
        costs.append(lost)
    assert costs[1] <= costs[0] * 1.001


def test_the_rise_of_the_loss_is_the_second_order_term_of_independent_gradients():
    inputs, gradients, error = psd(6, 9, 0), [psd(4, 7, 1), psd(5, 2, 2)], torch.randn(5, 6)
    moments = Moments.of_matrix("input", "layers", inputs, 50)
    moments.rows = RowWeights.of(gradients)
    ridged = gradients[1] + RIDGE * moments.rows.mean * torch.eye(5, dtype=torch.float64)
    weight = torch.zeros(5, 6)
    predicted = _by_gradients("b", weight, error, moments.for_layer(1))
    independent = cost(weight.double(), error.double(), inputs, ridged) / (2 * 50)
    assert predicted == pytest.approx(independent, rel=1e-5)


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path, monkeypatch):
    from emloc.compression import fitting

    example = family_named("llm").write_example(tmp_path / "example", seed=0)
    options = {**example, "device": "cpu", "format": "low_rank", "weigh_errors": "gradients"}
    whole = emloc.compress(output_dir=tmp_path / "whole", **options)
    fit, fitted = fitting.fit_group, []

    def killed(*given):
        fitted.append(given)
        if len(fitted) == 6:
            raise KeyboardInterrupt
        return fit(*given)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "fit_group", killed)
        with pytest.raises(KeyboardInterrupt):
            emloc.compress(output_dir=tmp_path / "again", **options)
    again = emloc.compress(output_dir=tmp_path / "again", **options)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_a_tower_that_no_sample_needs_has_no_gradients(tmp_path):
    example = family_named("vlm").write_example(tmp_path / "example", seed=0)
    rows = tmp_path / "text.jsonl"
    rows.write_text('{"question": "one two", "answer": "three four"}\n' * 4)
    emulator = emloc.compress(
        output_dir=tmp_path / "emulator", format="low_rank", weigh_errors="gradients", device="cpu",
        **{**example, "dataset": str(rows)},
    )  # fmt: skip
    layers = json.loads((emulator / "emloc.json").read_text())["layers"]
    assert layers
    assert not any("vision" in name for name in layers)


def test_formats_that_do_not_weigh_outputs_refuse_weights(tmp_path):
    example = family_named("llm").write_example(tmp_path / "example", seed=0)
    with pytest.raises(ConfigError, match="does not weigh a layer's outputs"):
        emloc.compress(
            output_dir=tmp_path / "emulator", format="quantized", bits=3, device="cpu",
            weigh_errors="gradients", **example,
        )  # fmt: skip


def test_its_memory_is_planned_and_kept(example, tmp_path):
    _, options = example
    emulator = emloc.compress(
        output_dir=tmp_path / "emulator", format="low_rank", weigh_errors="gradients",
        keep_ratio=0.4, memory="2GiB", **options,
    )  # fmt: skip
    measured = json.loads((emulator / "emloc.json").read_text())["measured"]
    assert 0 < measured["peak_bytes"] < 2**31
    assert 0 < measured["planned_bytes"] < 2**31
