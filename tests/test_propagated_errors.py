"""Blocks that are fitted to what they read in the emulator, against a whole model that is compressed step by
step.
"""

import pytest
import torch

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
from emloc.linalg.gram import Moments
from emloc.streaming.input_rows import input_rows

OPTIONS = {
    "quantized": {"format": "quantized", "bits": 2, "group_size": 32},
    "low_rank": {"format": "low_rank", "keep_ratio": 0.4},
}
MOST = ["(down_blocks|mid_block|up_blocks.0).*", "up_blocks.1.(attentions.0|resnets.0).*"]


@pytest.mark.parametrize("name", ["llm", "vlm", "diffusion"])
def test_each_block_is_fitted_to_what_it_reads_in_the_emulator(name, tmp_path):
    family = family_named(name)
    example = family.write_example(tmp_path / "example", seed=0)
    more = {"exclude": MOST} if name == "diffusion" else {}
    options = {**example, **OPTIONS["quantized"], **more, "output_dir": str(tmp_path / "emulator")}
    emulator = emloc.compress(propagate_errors=True, **options)
    plain = emloc.compress(**{**options, "output_dir": tmp_path / "plain"})
    made, before = Manifest.read(emulator).layers, Manifest.read(plain).layers
    assert made.keys() == before.keys()
    expected = _step_by_step(family, options, Manifest.read(emulator))
    assert expected.keys() == made.keys()
    apart = 0
    for owner, error in expected.items():
        assert made[owner]["relative_error"] == pytest.approx(error, rel=2e-3), owner
        apart += before[owner]["relative_error"] != pytest.approx(error, rel=4e-3)
    assert apart > len(expected) / 4  # what is read is not what the base reads


def _step_by_step(family, options, manifest):
    """The error of every group, where the model has the emulated weights of all blocks before it."""
    kind = with_plugin_options(CompressConfig)
    base, _ = open_model(str(options["model_name_or_path"]))
    config = of_family(kind(**options), family)
    batches = family.calibration_batches(base, config)
    model = family.load(base, "float32", "cpu")
    held = family.load(native_of(family, Checkpoint.open(options["output_dir"])), "float32", "cpu")
    skeleton = family.skeleton(base, torch.float32)
    groups = written_groups(manifest.layers, dense_shapes(manifest.layers, skeleton))
    errors = {}
    for block in family.blocks(skeleton):
        inside = [group for group in groups if f"{group.owner}.".startswith(f"{block}.")]
        moments = {group.owner: Moments("input", group.owner) for group in inside}
        handles = [_folding(family, model, batches, moments[g.owner], g.owner) for g in inside]
        with torch.no_grad():
            for batch in batches:
                _folding.batch = batch
                family.loss(model, batch)
        for handle in handles:
            handle.remove()
        for group in inside:
            lost = whole = 0.0
            for layer in group.layers:
                weight, stood = model.get_submodule(layer).weight, held.get_submodule(layer).weight
                turned = weight.shape != stood.shape
                stood = (stood.T if turned else stood).detach() + 0
                matrix, other = (
                    as_matrix(w.detach().T if turned else w.detach()).double()
                    for w in (weight, stood)
                )
                gram = moments[group.owner].matrix.double()
                lost += float((((matrix - other) @ gram) * (matrix - other)).sum())
                whole += float(((matrix @ gram) * matrix).sum())
                weight.data.copy_(stood)
            errors[group.owner] = (lost / whole) ** 0.5
    return errors


def _folding(family, model, batches, moments, layer):
    def fold(module, inputs, output):
        mask = token_mask_of(family, _folding.batch, layer)
        for rows in input_rows(module, inputs[0], output, mask, layer):
            moments.fold(rows)

    return model.get_submodule(layer).register_forward_hook(fold)


@pytest.mark.parametrize("format", OPTIONS)
def test_an_interrupted_run_gives_the_same_bytes(format, tmp_path, monkeypatch):
    from emloc.compression.emulator_folder import EmulatorFolder

    example = family_named("llm").write_example(tmp_path, seed=0)
    options = {**example, **OPTIONS[format], "propagate_errors": True}
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
    with pytest.raises(ConfigError, match="propagate_errors needs sizes that are known before"):
        emloc.compress(
            output_dir=tmp_path / "e", propagate_errors=True, format="low_rank",
            keep_ratio_allocation="error", **example,
        )  # fmt: skip
