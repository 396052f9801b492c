"""An emulator of the toy: the optimum of every layer, files that are whole, and a run that goes on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import CheckpointError, ConfigError, NumericalError, OutputError
from emloc.formats.low_rank import LowRank
from emloc.testing.toy_family import write_toy
from emloc.testing.toy_model import ToySizes

RATIO = {"format": "low_rank", "keep_ratio": 0.5}


def matrices(model, names):
    """Dense weights of layers, one upon the other, in float64."""
    return torch.cat([model.get_submodule(n).weight.detach().flatten(1) for n in names]).double()


def inputs_of(model, batches, name):
    """Rows that a layer reads in plain forwards: pixels, or a convolution's 3 × 3 patches."""
    rows = []
    layer = model.get_submodule(name)

    def read(module, inputs):
        x = inputs[0]
        if isinstance(module, torch.nn.Conv2d):
            x = torch.nn.functional.unfold(x, 3, padding=1).transpose(1, 2)
        rows.append(x.reshape(-1, x.shape[-1]).double())

    handle = layer.register_forward_pre_hook(read)
    with torch.no_grad():
        for batch in batches:
            model(batch["pictures"])
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("share_factors", [True, False])
def test_every_layer_is_the_dense_optimum(toy, tmp_path, share_factors):
    """Against the singular values of W Xᵀ, computed on the whole model at once."""
    folder = emloc.compress(
        output_dir=tmp_path / "e", share_factors=share_factors, **RATIO, **toy.example
    )
    base = toy.family.load(toy.checkpoint, "float32", "cpu")
    emulator = toy.family.load(Checkpoint.open(folder), "float32", "cpu")
    entries = Manifest.read(folder).layers
    assert len(entries) == (9 if share_factors else 12)
    for owner, entry in entries.items():
        weight, stored = (matrices(model, entry["layers"]) for model in (base, emulator))
        x = inputs_of(base, toy.batches, owner)
        assert entry["tokens"] == len(x) == 24 * 6 * 6
        best = torch.linalg.svdvals(weight @ x.T)[entry["rank"] :].norm()
        error, total = ((weight - stored) @ x.T).norm(), (weight @ x.T).norm()
        assert float(error) == pytest.approx(float(best), rel=1e-3), owner
        assert entry["relative_error"] == pytest.approx(float(best / total), rel=1e-3)
        assert entry["rank"] * sum(weight.shape) <= 0.5 * weight.numel()


def test_its_folder_is_a_checkpoint_with_a_shard_per_block(toy):
    folder = toy.stages["emulator"]
    shards = [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "emloc.json", *shards, "model.safetensors.index.json"]  # fmt: skip
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {name: shard for shard in shards for name in load_file(folder / shard)}
    assert index["weight_map"] == held
    assert held["blocks.1.conv.left"] == shards[1]
    assert held["stem.weight"] == held["head.bias"] == shards[3]
    base, emulator = toy.checkpoint, Checkpoint.open(folder)
    replaced = {f"{n}.weight" for e in Manifest.read(folder).layers.values() for n in e["layers"]}
    for name in base.tensors:
        assert (name in emulator.tensors) == (name not in replaced)
        assert name in replaced or torch.equal(base.read(name), emulator.read(name))
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "emloc"
    assert config == toy.checkpoint.config


def test_the_manifest_says_what_it_holds(toy):
    folder = toy.stages["emulator"]
    manifest = Manifest.read(folder)
    assert manifest.base_model.name_or_path == toy.example["model_name_or_path"]
    assert manifest.settings["keep_ratio"] == 0.5
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"emloc.json"}
    held = sum(
        t.numel() * t.element_size()
        for f in folder.glob("*.safetensors")
        for t in load_file(f).values()
    )
    assert manifest.summary["emulator_bytes"] == held
    assert manifest.summary["calibration_samples"] == 24


def test_a_full_rank_emulator_is_the_base(toy, tmp_path):
    folder = emloc.compress(
        output_dir=tmp_path / "e", format="low_rank", rank_pattern={".*": 10_000}, **toy.example
    )
    pictures = toy.batches[0]["pictures"]
    with torch.no_grad():
        ours, theirs = (
            toy.family.load(checkpoint, "float32", "cpu")(pictures)
            for checkpoint in (Checkpoint.open(folder), toy.checkpoint)
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("other", [{"rank": 1}, {"format": "quantized"}, {"layers": ["elsewhere"]}])
def test_a_finished_block_in_another_form_is_made_anew(toy, tmp_path, monkeypatch, other):
    """Forms that are chosen by what was computed may differ on another device: shards and config agree."""
    real = LowRank.fit

    def fit(self, weights, moments, *others):
        if "blocks.2" in moments.name:
            raise KeyboardInterrupt
        return real(self, weights, moments, *others)

    options = {"output_dir": tmp_path / "e", **RATIO, **toy.example}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LowRank, "fit", fit)
        emloc.compress(**options)
    [begun] = tmp_path.iterdir()
    report = json.loads((begun / "block-00001.json").read_text())
    next(iter(report["layers"].values())).update(other)
    (begun / "block-00001.json").write_text(json.dumps(report))
    shard = next(begun.glob("*-00001-of-*"))
    shard.write_bytes(b"of the other form")
    folder = emloc.compress(**options)
    for path in toy.stages["emulator"].glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_an_interrupted_run_goes_on_after_its_last_block(toy, tmp_path, monkeypatch):
    """To the same bytes, and without fitting a finished block again, unless its shard is damaged."""
    real, fitted = LowRank.fit, []

    def fit(self, weights, moments, *others):
        if "blocks.2" in moments.name and not resumed:
            raise KeyboardInterrupt
        fitted.append(moments.name.split(".")[1])
        return real(self, weights, moments, *others)

    monkeypatch.setattr(LowRank, "fit", fit)
    options = {"output_dir": tmp_path / "e", **RATIO, **toy.example}
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        emloc.compress(**options)
    assert not (tmp_path / "e").exists()
    with pytest.raises(OutputError, match="interrupted run with other settings"):
        emloc.compress(**{**options, "keep_ratio": 0.4})
    resumed = True
    fitted.clear()
    first = tmp_path / "e.partial/model-00001-of-00004.safetensors"
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    folder = emloc.compress(**options)
    assert set(fitted) == {"0", "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["e"]
    for path in toy.stages["emulator"].glob("*.safetensors"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert emloc.compress(**options) == folder  # complete already
    assert set(fitted) == {"0", "2"}
    with pytest.raises(OutputError, match="nothing is ever overwritten"):
        emloc.compress(**{**options, "keep_ratio": 0.4})


def changed(toy, folder, name, change):
    """The toy's model with one tensor changed."""
    base = write_toy(folder, ToySizes(), 0)
    tensors = load_file(base / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, base / "model.safetensors")
    return {**toy.example, "model_name_or_path": str(base)}


def test_what_is_no_number_names_the_layer(toy, tmp_path):
    def poisoned(weight):
        return weight.index_fill(0, torch.tensor([0]), float("nan"))

    for name, layer in (
        ("blocks.1.down.weight", r"blocks\.1\.down"),
        ("blocks.1.norm.bias", r"blocks\.1\.gate"),
    ):
        options = changed(toy, tmp_path / name, name, poisoned)
        with pytest.raises(NumericalError, match=f"Layer {layer}"):
            emloc.compress(output_dir=tmp_path / f"{name}-out", **options)
    assert not list(tmp_path.glob("*-out"))


def test_verify_notices_damage(toy, tmp_path):
    folder = emloc.compress(output_dir=tmp_path / "e", **RATIO, **toy.example)
    assert emloc.verify(path=folder)["tensors"] == len(Checkpoint.open(folder).tensors)
    shard = folder / "model-00002-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model-00002.* is not what was written"):
        emloc.verify(path=folder)
    tensors = load_file(shard)
    tensors.pop("blocks.1.down.left")
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.down\.left"):
        toy.family.load(Checkpoint.open(folder), "float32", "cpu")
    options = changed(toy, tmp_path / "base", "head.bias", lambda bias: bias[:-1].clone())
    with pytest.raises(CheckpointError, match=r"head\.bias of .* is \(4,\)"):
        emloc.verify(path=options["model_name_or_path"])


def test_options_are_obeyed_or_refused(toy, tmp_path):
    folder = emloc.compress(
        output_dir=tmp_path / "e", exclude=["conv", r"0\..*"], keep_ratio_pattern={"down": 0.3},
        rank_pattern={"1.gate": 2}, dtype="bfloat16", num_calibration_samples=10, seed=3, **RATIO,
        **toy.example,
    )  # fmt: skip
    manifest = Manifest.read(folder)
    assert {name: entry["rank"] for name, entry in manifest.layers.items()} == {
        "blocks.1.gate": 2, "blocks.1.up": 3, "blocks.1.down": 2,
        "blocks.2.gate": 4, "blocks.2.down": 2}  # fmt: skip
    assert manifest.kept_dense["blocks.2.conv"] == "excluded"
    assert manifest.summary["calibration_samples"] == 10
    assert {info.dtype for info in Checkpoint.open(folder).tensors.values()} == {torch.bfloat16}
    for options, said in (
        ({"exclude": ["cnv"]}, "'cnv' matches no layer"),
        ({"exclude": [".*"]}, "excluded"),
        ({"keep_rato": 0.3}, "Did you mean keep_ratio"),
        ({"keep_ratio": 2}, "keep_ratio = 2"),
        ({"format": "quantized", "rank_pattern": {"up": 2}}, "means nothing to format=quantized"),
    ):
        with pytest.raises(ConfigError, match=said):
            emloc.compress(output_dir=tmp_path / "x", **options, **toy.example)
    with pytest.raises(CheckpointError, match="already quantised or an emulator"):
        emloc.compress(
            output_dir=tmp_path / "x", **{**toy.example, "model_name_or_path": str(folder)}
        )
    assert not (tmp_path / "x").exists()
