"""Ranks allocated by predicted error, on checkpoints on disk."""

import json

import pytest
import torch
from llm_reference import best_error, layer_inputs, load
from tiny_models import write_tiny

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.extend.plugin_options import with_plugin_options
from emloc_llm.example import write_rows
from emloc_llm.family import LLMFamily


def compress(base, data, output, **options):
    return emloc.compress(
        model_name_or_path=str(base), dataset=str(data), output_dir=output, max_length=96,
        format="low_rank", keep_ratio_allocation="error", **options,
    )  # fmt: skip


def weight_of(model, name):
    """d_out × d_in, also where a Conv1D stores it the other way round."""
    module = model.get_submodule(name)
    transposed = type(module).__name__ == "Conv1D"
    return module.weight.T if transposed else module.weight


@pytest.fixture(scope="module", params=["llama", "gpt2", "xlm"])
def allocated(request, tmp_path_factory):
    """Weights stored d_out × d_in, and the other way round; blocks that write into a cache."""
    root = tmp_path_factory.mktemp(request.param)
    write_tiny(root / "base", request.param)
    data = write_rows(root / "train.jsonl", 24, seed=1)
    folder = compress(root / "base", data, root / "e", keep_ratio=0.5)
    return root / "base", data, folder


def batches_of(base, data):
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="x", dataset=str(data), max_length=96
    )
    return LLMFamily().calibration_batches(Checkpoint.open(base), config)


def test_every_layer_is_the_optimum_of_its_allocated_rank(allocated):
    base, data, folder = allocated
    manifest = Manifest.read(folder)
    model, emulator = load(base), load(folder)
    inputs = layer_inputs(model, batches_of(base, data), manifest.layers)
    for owner, entry in manifest.layers.items():
        weight = torch.cat([weight_of(model, n) for n in entry["layers"]]).double()
        stand_in = torch.cat([emulator.get_submodule(n).weight for n in entry["layers"]]).double()
        x = inputs[owner]
        best, total = best_error(weight, x, entry["rank"]), (weight @ x.T).norm()
        assert ((weight - stand_in) @ x.T).norm() <= best * (1 + 1e-4) + 1e-5 * total
        assert entry["relative_error"] == pytest.approx(float(best / total), abs=2e-4)
        assert torch.linalg.matrix_rank(stand_in, rtol=1e-5) == entry["rank"]
    config = json.loads((folder / "config.json").read_text())
    said = {g["layers"][0]: g["rank"] for g in config["quantization_config"]["groups"]}
    assert said == {owner: entry["rank"] for owner, entry in manifest.layers.items()}
    emloc.verify(path=folder)


def test_it_spends_what_the_uniform_ratio_does_and_differs_from_it(allocated):
    _, _, folder = allocated
    layers = Manifest.read(folder).layers.values()
    cost = [sum(entry["d_out"]) + entry["d_in"] for entry in layers]
    left = sum(c * (e["uniform_rank"] - e["rank"]) for c, e in zip(cost, layers))
    assert 0 <= left < max(cost)
    assert any(e["rank"] > e["uniform_rank"] for e in layers)
    assert any(e["rank"] < e["uniform_rank"] for e in layers)
    for c, e in zip(cost, layers):
        assert e["uniform_rank"] == int(0.5 * sum(e["d_out"]) * e["d_in"] / c)


def test_sensitivity_is_what_a_layers_error_does_to_its_blocks_output(allocated):
    """Against the whole model in float64, its own forward, and factors from a plain SVD."""
    base, data, folder = allocated
    manifest = Manifest.read(folder)
    model = load(base, torch.float64)
    batches = batches_of(base, data)
    inputs = layer_inputs(model, batches, manifest.layers)
    first = {k: batches[0][k] for k in ("input_ids", "attention_mask")}
    mask = first["attention_mask"].bool()

    def output(block):
        kept = []
        handle = model.get_submodule(block).register_forward_hook(lambda *a: kept.append(a[2]))
        with torch.no_grad():
            model(**first, use_cache=False)
        handle.remove()
        return (kept[0][0] if isinstance(kept[0], tuple) else kept[0])[mask]

    squares = 0.0
    for owner, entry in manifest.layers.items():
        block = ".".join(owner.split(".")[:3])
        before = output(block)
        weights = [weight_of(model, name).clone() for name in entry["layers"]]
        stack, x = torch.cat(weights), inputs[owner]
        u = torch.linalg.svd(stack @ x.T, full_matrices=False)[0][:, : entry["uniform_rank"]]
        for name, part in zip(entry["layers"], (u @ u.T @ stack).split(entry["d_out"])):
            weight_of(model, name).data.copy_(part)
        after = output(block)
        for name, part in zip(entry["layers"], weights):
            weight_of(model, name).data.copy_(part)
        ratios = (after - before).square().sum(-1) / before.square().sum(-1)
        assert entry["sensitivity"] == pytest.approx(float(ratios.mean()), rel=1e-3), owner
        squares += float(ratios.mean())
    errors = manifest.summary["predicted_error"]
    assert errors["uniform"] == pytest.approx(squares**0.5, rel=1e-3)
    assert 0 < errors["allocated"] < errors["uniform"]


def test_layers_that_options_name_keep_their_rank(tiny, tmp_path, capfd):
    folder = compress(
        tiny.base, tiny.data, tmp_path / "e", keep_ratio=0.5, rank_pattern={"v_proj": 3},
        keep_ratio_pattern={"down_proj": 0.2}, exclude=["o_proj"],
    )  # fmt: skip
    manifest = Manifest.read(folder)
    layers = manifest.layers
    for block in ("0", "1", "2"):
        assert layers[f"model.layers.{block}.mlp.down_proj"]["rank"] == int(0.2 * 48 * 80 / 128)
        assert layers[f"model.layers.{block}.self_attn.v_proj"]["rank"] == 3
        assert manifest.kept_dense[f"model.layers.{block}.self_attn.o_proj"] == "excluded"
    free = [e for name, e in layers.items() if name.endswith(("q_proj", "gate_proj"))]
    assert any(e["rank"] != e["uniform_rank"] for e in free)
    assert "uniform_rank" not in layers["model.layers.0.self_attn.v_proj"]
    assert sum((sum(e["d_out"]) + e["d_in"]) * (e["uniform_rank"] - e["rank"]) for e in free) >= 0
    said = " ".join(capfd.readouterr().err.split())
    errors = manifest.summary["predicted_error"]
    assert f"{errors['allocated']:.4f} (uniform {errors['uniform']:.4f})" in said


def test_where_all_ranks_are_given_there_is_nothing_to_allocate(tiny, tmp_path):
    named = {"rank_pattern": {".*": 5}}
    folder = compress(tiny.base, tiny.data, tmp_path / "e", **named)
    plain = emloc.compress(
        model_name_or_path=str(tiny.base), dataset=str(tiny.data), output_dir=tmp_path / "plain",
        max_length=96, format="low_rank", **named,
    )  # fmt: skip
    for shard in plain.glob("*.safetensors"):
        assert (folder / shard.name).read_bytes() == shard.read_bytes()


def test_uniform_is_the_default_and_measures_nothing(tiny):
    manifest = Manifest.read(tiny.emulator)
    assert manifest.settings["keep_ratio_allocation"] == "uniform"
    assert "predicted_error" not in manifest.summary
    assert not any("sensitivity" in entry for entry in manifest.layers.values())


def test_a_run_that_is_killed_while_it_cuts_fits_nothing_again(tmp_path, monkeypatch):
    from emloc.compression import truncation
    from emloc.compression.emulator_folder import EmulatorFolder

    write_tiny(tmp_path / "base", "llama")
    data = write_rows(tmp_path / "train.jsonl", 8, seed=1)
    whole = compress(tmp_path / "base", data, tmp_path / "whole", keep_ratio=0.5)
    cut, times = truncation._cut, []

    def killed(folder, block):
        if times:
            raise KeyboardInterrupt
        times.append(block)
        cut(folder, block)

    monkeypatch.setattr(truncation, "_cut", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "base", data, tmp_path / "e", keep_ratio=0.5)
    monkeypatch.setattr(truncation, "_cut", cut)
    monkeypatch.setattr(EmulatorFolder, "write_block", None)
    again = compress(tmp_path / "base", data, tmp_path / "e", keep_ratio=0.5)
    digests = [Checkpoint.open(folder).digest() for folder in (whole, again)]
    assert digests[0] == digests[1]
