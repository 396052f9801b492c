"""LoRA, a smaller model, and EMLoC with an emulator by plain SVD."""

import json

import pytest
import torch
from pruning_reference import load
from safetensors.torch import load_file

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.config import StageConfig
from emloc.errors import ConfigError
from emloc.extend.capabilities import TRANSFORMER_BLOCKS, TRANSFORMERS_MODEL
from emloc.extend.methods import Method, Task
from emloc.extend.plugins import families_for, load_plugins, method_named
from emloc_baselines.bench import cell as cell_module
from emloc_baselines.bench.harness import run_bench
from emloc_baselines.plain_svd import PlainSvd, PlainSvdUncorrected
from emloc_baselines.smaller import SmallerModel
from emloc_llm.example import write_model


def task_of(base, data, keep_ratio=0.5, **options):
    common = {"dataset": str(data), "max_length": 96}
    train = {**common, "max_steps": 3, "lora_r": 3, "learning_rate": 1e-2, "logging_steps": 1}
    compress = {**common, "format": "low_rank"}
    return Task(str(base), keep_ratio, 0, compress, train, {**common, "limit": "none"}, options)


def test_every_registered_method_is_one():
    found = load_plugins().methods
    assert {"emloc", "emloc-uncorrected", "lora", "qlora", "loram-rand", "loram-stru", "upop",
            "offsite-tuning", "smaller-model"} <= set(found)  # fmt: skip
    for entry in found.values():
        method = entry.load()
        assert isinstance(method, Method), entry.name
        assert issubclass(method.options, StageConfig)
        assert entry.trains_as in ("", *found)
        works_for = set(families_for(entry))
        assert {"llm", "vlm"} <= works_for
        assert ("diffusion" in works_for) == {TRANSFORMERS_MODEL, TRANSFORMER_BLOCKS}.isdisjoint(
            entry.needs
        )


def test_uncorrected_is_the_trained_lora_as_an_adapter_of_the_base(tiny, tmp_path):
    task, method = task_of(tiny.base, tiny.data), method_named("emloc-uncorrected").load()
    light = method.build(task, tmp_path / "light")
    adapter = method.train(task, light, tmp_path / "adapter")
    recovered = method.recover(task, light, adapter, tmp_path / "recovered")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, recovered))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    emloc.merge(adapter=str(recovered), output_dir=tmp_path / "merged")
    corrected = method_named("emloc").load().recover(task, light, adapter, tmp_path / "corrected")
    other = load_file(corrected / "adapter_model.safetensors")
    assert any(not torch.equal(before[key], other[key]) for key in before)


def test_svd_factors_are_the_best_in_frobenius_norm(tiny, tmp_path):
    light = PlainSvd().build(task_of(tiny.base, tiny.data), tmp_path / "light")
    base, emulator = load(tiny.base), load(light)
    checked = 0
    for entry in Manifest.read(light).layers.values():
        stack = torch.cat([base.get_submodule(n).weight for n in entry["layers"]]).double()
        u, s, vt = torch.linalg.svd(stack, full_matrices=False)
        rank = entry["rank"]
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
        found = torch.cat([emulator.get_submodule(n).weight.product() for n in entry["layers"]])
        assert torch.allclose(found.double(), expected, atol=1e-4)
        checked += len(entry["layers"])
    assert checked == 21


def test_svd_is_as_large_as_emloc_and_is_corrected_like_it(tiny, tmp_path):
    task, method = task_of(tiny.base, tiny.data), PlainSvd()
    light = method.build(task, tmp_path / "light")
    aware = method_named("emloc").load().build(task, tmp_path / "aware")
    one, other = (Manifest.read(folder) for folder in (light, aware))
    assert one.summary["emulator_bytes"] == other.summary["emulator_bytes"]
    assert {k: v["rank"] for k, v in one.layers.items()} == {
        k: v["rank"] for k, v in other.layers.items()
    }
    assert emloc.verify(path=light)["kind"] == "emulator"
    adapter = method.train(task, light, tmp_path / "adapter")
    corrected = method.recover(task, light, adapter, tmp_path / "corrected")
    for entry in Manifest.read(corrected).layers.values():
        assert entry["residual_after"] < 1e-3 * entry["residual_before"]
    plain = PlainSvdUncorrected().recover(task, light, adapter, tmp_path / "plain")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, plain))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_smaller_model_is_trained_and_scored_itself(tiny, tmp_path):
    small = write_model(tmp_path / "small", num_hidden_layers=2, hidden_size=32)
    method = SmallerModel()
    task = task_of(tiny.base, tiny.data, smaller_model_name_or_path=str(small))
    assert method.build(task, tmp_path / "none") is None
    adapter = method.train(task, None, tmp_path / "adapter")
    assert method.recover(task, None, adapter, tmp_path / "x") == adapter
    assert Manifest.read(adapter).base_model.name_or_path == str(small)
    with pytest.raises(ConfigError, match="smaller_model_name_or_path is required"):
        method.train(task_of(tiny.base, tiny.data), None, tmp_path / "y")

    data = {"dataset": str(tiny.data), "max_length": 96}
    out = run_bench(
        {
            "model_name_or_path": str(tiny.base), "output_dir": str(tmp_path / "bench"),
            "train": {"max_steps": 2, "lora_r": 2}, "evaluate": {"max_new_tokens": 0},
            "datasets": {"words": {**data, "evaluate": {"dataset": str(tiny.test)}}},
            "methods": {"half": {"method": "smaller-model", "smaller_model_name_or_path": str(small)}},
        },
        run=lambda cell, root: cell_module.run_cell(cell, root),
    )  # fmt: skip
    base, half = (json.loads(line) for line in (out / "results.jsonl").read_text().splitlines())
    assert half["held_bytes"] == sum(p.numel() * 4 for p in load(small).parameters())
    assert half["score"] is None
    found = emloc.evaluate(
        model_name_or_path=str(small), dataset=str(tiny.test), max_length=96, max_new_tokens=0
    )
    assert abs(half["loss"] - found["loss"]) < abs(half["loss"] - base["loss"])
    assert str(small) not in json.dumps(half["inputs"]), "its weights count, not where they lie"
