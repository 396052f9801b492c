"""What every family must do, whoever wrote it. Parametrised over the installed families."""

import json
import shutil

import pytest
import torch
from torch import nn

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig, EvaluateConfig
from emloc.extend.capabilities import adapter_formats_of, token_mask_of
from emloc.extend.family import ModelFamily
from emloc.extend.losses import loss_sum
from emloc.extend.opening import family_of
from emloc.extend.plugin_options import with_family_options, with_plugin_options
from emloc.options.marks import loss_alone
from emloc.planning.family import PlannedFamily
from emloc.streaming.lockstep import Call, lockstep
from emloc.streaming.stream import UnitStream


def options(**given):
    """Options of compress, with those of the installed families."""
    return with_plugin_options(CompressConfig)(**given)


@pytest.fixture(scope="session")
def checkpoint(example):
    return Checkpoint.open(example["model_name_or_path"])


@pytest.fixture(scope="session")
def batches(family, example, checkpoint):
    config = options(output_dir="unused", **example)
    return family.calibration_batches(checkpoint, config)


def test_is_a_family(family):
    assert isinstance(family, ModelFamily)
    assert adapter_formats_of(family)


def test_recognises_its_own_checkpoint_from_the_config(family, checkpoint):
    assert family_of(checkpoint).name == family.name


def test_skeleton_has_no_weights_and_real_buffers(family, checkpoint):
    model = family.skeleton(checkpoint, torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    assert not model.training
    for name, parameter in model.named_parameters():
        stored = family.stored(model, name, checkpoint)
        assert stored is not None, name
        assert stored.read(checkpoint.read).shape == parameter.shape


def test_blocks_and_layers(family, checkpoint):
    model = family.skeleton(checkpoint, torch.float32)
    blocks = list(family.blocks(model))
    assert len(blocks) == len(set(blocks)) >= 2
    assert not any(a != b and a.startswith(f"{b}.") for a in blocks for b in blocks)
    groups = family.layer_groups(model)
    layers = [name for group in groups for name in group]
    assert len(layers) == len(set(layers)) > 0
    for group in groups:
        modules = [model.get_submodule(name) for name in group]
        assert len({module.weight.shape[1] for module in modules}) == 1
        assert all(any(f"{name}.".startswith(f"{block}.") for block in blocks) for name in group)


def test_groups_really_share_their_input(family, checkpoint, batches):
    stream = UnitStream(family, checkpoint)
    seen = {}

    def record(name):
        return lambda module, inputs: seen.setdefault(name, []).append(inputs[0].data_ptr())

    groups = family.layer_groups(stream.model)
    for name in (name for group in groups for name in group):
        stream.model.get_submodule(name).register_forward_pre_hook(record(name))
    calls = [Call(lambda: loss_sum(family, stream.model, batches[0]))]
    lockstep(stream.model, stream.units, calls, stream.filled)
    for group in groups:
        assert all(seen[name] == seen[group[0]] for name in group)
    assert any(len(group) > 1 for group in groups)


def test_streamed_forward_is_the_plain_forward(family, checkpoint, batches):
    """Bit for bit, with all weights loaded at once instead of one unit at a time."""
    stream = UnitStream(family, checkpoint)
    calls = [Call(lambda b=batch: loss_sum(family, stream.model, b)) for batch in batches]
    streamed = lockstep(stream.model, stream.units, calls, stream.filled)
    whole = family.skeleton(checkpoint, torch.float32)
    for name, _ in list(whole.named_parameters(remove_duplicate=False)):
        owner, _, leaf = name.rpartition(".")
        value = family.stored(whole, name, checkpoint).read(checkpoint.read).float()
        setattr(whole.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    with torch.no_grad():
        plain = [loss_sum(family, whole, batch) for batch in batches]
    assert streamed == plain
    assert all(result.terms > 0 for result in plain)


def test_calibration_is_by_seed(family, example, checkpoint, batches):
    again = family.calibration_batches(checkpoint, options(output_dir="x", **example))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, again) for k in a)
    few = {**example, "num_calibration_samples": 4}
    some = [
        family.calibration_batches(checkpoint, options(output_dir="x", seed=seed, **few))
        for seed in (0, 1)
    ]
    first = [next(iter(part[0].values())) for part in some]
    assert first[0].shape[0] == 4
    assert first[0].shape != first[1].shape or not torch.equal(*first)
    for batch in batches:
        assert token_mask_of(family, batch).dtype == torch.bool
        assert bool(token_mask_of(family, batch).any())


def test_stages_leave_what_they_promise(family, stages, example):
    kinds = {name: Manifest.read(folder).kind for name, folder in stages.items()}
    assert kinds == {"emulator": "emulator", "adapter": "adapter",
                     "corrected": "corrected_adapter", "merged": "merged_model"}  # fmt: skip
    digest = Checkpoint.open(example["model_name_or_path"]).digest()
    for name, folder in stages.items():
        manifest = Manifest.read(folder)
        assert manifest.base_model.digest == digest, name
        assert manifest.family == family.name
        if name != "adapter":
            assert emloc.verify(path=folder)["kind"] == kinds[name]
    emulator = Manifest.read(stages["emulator"])
    assert emulator.summary["emulator_bytes"] < emulator.summary["base_bytes"]
    assert all(0 < entry["relative_error"] < 1 for entry in emulator.layers.values())


def test_each_stage_was_planned_and_kept_to_its_memory(stages):
    for folder in stages.values():
        manifest = Manifest.read(folder)
        assert 0 < manifest.measured["planned_bytes"] <= 1 << 30
        assert manifest.measured["peak_bytes"] <= 1 << 30
        assert "memory" not in manifest.settings


def test_a_plan_of_the_config_alone_counts_what_the_stages_wrote(family, example, stages, tmp_path):
    real = Checkpoint.open(example["model_name_or_path"])
    bare = shutil.copytree(
        example["model_name_or_path"],
        tmp_path / "bare",
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    plan = emloc.plan(**{**example, "model_name_or_path": str(bare)}, keep_ratio=0.5, lora_r=3)
    sizes = [torch.Size(info.shape).numel() for info in real.tensors.values()]
    assert plan["parameters"] == sum(sizes)
    compress = plan["stages"]["compress"]["disk_bytes"]["lines"]
    emulator = Checkpoint.open(str(stages["emulator"]))
    assert compress["emulator"] == sum(info.nbytes for info in emulator.tensors.values())
    if not isinstance(family, PlannedFamily):
        return  # it does not say what it trains
    trained = Manifest.read(stages["adapter"]).summary
    lines = plan["stages"]["train"]["device_bytes"]["lines"]
    assert lines["LoRA"] == trained["trainable_bytes"]
    assert lines["weights"] + lines["LoRA"] == trained["train_weight_bytes"]


def test_correction_removes_the_residual(stages):
    for name, entry in Manifest.read(stages["corrected"]).layers.items():
        assert entry["residual_before"] > 0, name
        assert entry["residual_after"] < 1e-3 * entry["residual_before"], name
    before, after = (Adapter.open(str(stages[key])) for key in ("adapter", "corrected"))
    for layer in before.layers:
        assert torch.equal(before.read(layer.down_key), after.read(layer.down_key))
        assert not torch.equal(before.read(layer.up_key), after.read(layer.up_key))


def test_merged_scores_as_the_adapter_does(family, example, stages):
    data = {key: value for key, value in example.items() if key != "model_name_or_path"}
    base = example["model_name_or_path"]
    fast = loss_alone(with_family_options(EvaluateConfig, family))
    plain = emloc.evaluate(model_name_or_path=base, **data, **fast)["loss"]
    adapted = emloc.evaluate(
        model_name_or_path=base, adapter=str(stages["corrected"]), **data, **fast
    )["loss"]
    merged = emloc.evaluate(model_name_or_path=str(stages["merged"]), **data, **fast)["loss"]
    assert merged == pytest.approx(adapted, rel=1e-4)
    assert abs(plain - adapted) > 1e-4


def test_manifests_are_json_without_surprises(stages):
    for folder in stages.values():
        text = (folder / "emloc.json").read_text()
        assert json.loads(text)["format"] == 1
        assert "NaN" not in text
