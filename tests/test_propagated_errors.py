"""Layers that make up for the errors of those before, against a model that is compressed step by step."""

import pytest
import torch
from own_families import installed

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.compression.groups import dense_shapes, written_groups
from emloc.config import CompressConfig
from emloc.errors import ConfigError
from emloc.extend.capabilities import native_of, token_mask_of
from emloc.extend.opening import open_model
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.extend.plugins import family_named
from emloc.linalg.convolution import as_matrix
from emloc.streaming.input_rows import input_rows

QUANTIZED = {"format": "quantized", "bits": 2, "group_size": 32}
LOW_RANK = {"format": "low_rank", "keep_ratio": 0.4}
MOST = ["(down_blocks|mid_block|up_blocks.0).*", "up_blocks.1.(attentions.0|resnets.0).*"]


@pytest.fixture(params=["llm", "vlm", "diffusion", "text-to-text"])
def name(request):
    with installed(request.param):
        yield request.param


def test_each_layer_makes_up_for_the_errors_of_those_before(name, tmp_path):
    """Layer after layer, on what the emulator's earlier layers leave to read: the weight that is rounded is
    the regression, in float64, and the codes are nearer to it than to the base's own.
    """
    family = family_named(name)
    example = family.write_example(tmp_path / "example", seed=0)
    more = {"exclude": MOST} if name == "diffusion" else {}
    options = {**example, **QUANTIZED, **more, "output_dir": str(tmp_path / "emulator")}
    manifest = Manifest.read(emloc.compress(propagate_errors=True, **options))
    errors = _step_by_step(family, options, manifest)
    assert errors.keys() == manifest.layers.keys()
    moved = 0
    for owner, (expected, unmoved) in errors.items():
        assert manifest.layers[owner]["relative_error"] == pytest.approx(expected, rel=1e-2), owner
        moved += unmoved > 1.02 * expected
    assert moved > len(errors) / 4  # what is read is not what the base reads


def _step_by_step(family, options, manifest):
    """Relative errors of every group's outputs on what it reads in the emulator: against the regression, and
    against the base's weights.
    """
    base, _ = open_model(str(options["model_name_or_path"]))
    config = of_family(with_plugin_options(CompressConfig)(**options), family)
    batches = family.calibration_batches(base, config)
    model, beside = (family.load(base, "float32", "cpu") for _ in range(2))
    stored = native_of(family, Checkpoint.open(options["output_dir"]))
    held = family.load(stored, "float32", "cpu")
    groups = written_groups(manifest.layers, dense_shapes(manifest.layers, model))
    in_blocks = [
        (b, g) for b in family.blocks(model) for g in groups if f"{g.owner}.".startswith(f"{b}.")
    ]
    errors = {}
    for _, group in _in_order(family, model, batches, in_blocks):
        x, there = (_rows(family, m, batches, group.owner) for m in (model, beside))
        moments, cross = there.T @ there, x.T @ there
        ridge = 0.3 * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
        lost = unmoved = whole = 0.0
        for layer in group.layers:
            turned = (
                model.get_submodule(layer).weight.shape != held.get_submodule(layer).weight.shape
            )
            weight, stood = (
                as_matrix(m.get_submodule(layer).weight.detach() + 0).double()
                for m in (model, held)
            )
            weight = weight.T if turned else weight
            target = torch.linalg.solve(moments + ridge, (weight @ (cross + ridge)).T).T
            lost += float(((target - stood) @ there.T).square().sum())
            unmoved += float(((weight - stood) @ there.T).square().sum())
            whole += float((target @ there.T).square().sum())
            stood = stood.T if turned else stood
            shape = beside.get_submodule(layer).weight.shape
            beside.get_submodule(layer).weight.data.copy_(stood.reshape(shape))
        errors[group.owner] = (lost / whole) ** 0.5, (unmoved / whole) ** 0.5
    return errors


def _in_order(family, model, batches, in_blocks):
    """Sort the groups by when a forward of the model reaches them."""
    order, handles = [], []

    def noting(owner):
        return lambda *_: order.append(owner)

    for _, group in in_blocks:
        module = model.get_submodule(group.owner)
        handles.append(module.register_forward_hook(noting(group.owner)))
    with torch.no_grad():
        family.loss(model, batches[0])
    for handle in handles:
        handle.remove()
    return sorted(in_blocks, key=lambda pair: order.index(pair[1].owner))


def _rows(family, model, batches, layer):
    rows = []
    for batch in batches:

        def keep(module, inputs, output, batch=batch):
            mask = token_mask_of(family, batch, layer)
            rows.extend(input_rows(module, inputs[0], output, mask, layer))

        handle = model.get_submodule(layer).register_forward_hook(keep)
        with torch.no_grad():
            family.loss(model, batch)
        handle.remove()
    return torch.cat(rows).double()


@pytest.mark.parametrize("format", [QUANTIZED, LOW_RANK], ids=["codes", "factors"])
def test_an_interrupted_run_gives_the_same_bytes(format, tmp_path, monkeypatch):
    from emloc.compression.emulator_folder import EmulatorFolder

    example = family_named("llm").write_example(tmp_path, seed=0)
    options = {**example, **format, "propagate_errors": True}
    whole = emloc.compress(output_dir=tmp_path / "whole", **options)
    write, written = EmulatorFolder.write_block, []

    def killed(folder, block, *more):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(block)
        write(folder, block, *more)

    with monkeypatch.context() as patch:
        patch.setattr(EmulatorFolder, "write_block", killed)
        with pytest.raises(KeyboardInterrupt):
            emloc.compress(output_dir=tmp_path / "again", **options)
    assert len(written) == 2
    again = emloc.compress(output_dir=tmp_path / "again", **options)
    assert Manifest.read(again).files == Manifest.read(whole).files


def test_sizes_that_are_found_afterwards_cannot_propagate(tmp_path):
    example = family_named("llm").write_example(tmp_path, seed=0)
    with pytest.raises(ConfigError, match="propagate_errors needs sizes before"):
        emloc.compress(
            output_dir=tmp_path / "e", propagate_errors=True, format="low_rank",
            keep_ratio_allocation="error", **example,
        )  # fmt: skip
