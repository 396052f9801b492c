"""A LoRA on the toy from training to the merged model: the formula, limits, refusals, and memory."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from chosen_limit import chosen_limit
from safetensors.torch import load_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError, MemoryLimitError, MismatchError
from emloc.planning import contract as contracts
from emloc.testing import pretend_device


def factors(folder):
    """B and A of every layer in float64, convolutions' as matrices."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = [key.split(".lora_A")[0] for key in tensors if "lora_A" in key]
    return {
        name.removeprefix("base_model.model."): [
            tensors[f"{name}.lora_{part}.weight"].flatten(1).double() for part in "BA"
        ]
        for name in names
    }


@pytest.fixture
def models(toy):
    """Base and emulator."""
    emulator = Checkpoint.open(str(toy.stages["emulator"]))
    return [toy.family.load(c, "float32", "cpu") for c in (toy.checkpoint, emulator)]


def mismatch(models, name):
    base, emulator = (m.get_submodule(name).weight.detach().flatten(1).double() for m in models)
    return emulator - base


def test_correction_is_the_float64_formula(toy, models):
    """B_c = B + E Aᵀ(AAᵀ)⁻¹ / s, of linear layers and convolutions."""
    before, after = (factors(toy.stages[name]) for name in ("adapter", "corrected"))
    assert len(before) == 12
    scaling = 32 / 3
    for name, (b, a) in before.items():
        wanted = b + mismatch(models, name) @ a.T @ torch.linalg.inv(a @ a.T) / scaling
        torch.testing.assert_close(after[name][0], wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(after[name][1], a)


def test_it_acts_on_the_base_as_it_did_on_the_emulator(toy, models):
    """On inputs that the LoRA reads in full, layer by layer; without the correction it does not."""
    before, after = (factors(toy.stages[name]) for name in ("adapter", "corrected"))
    draw = torch.Generator().manual_seed(0)
    for name, (b, a) in before.items():
        x = a.T @ torch.randn(len(a), 4, generator=draw, dtype=torch.float64)
        base, emulator = (m.get_submodule(name).weight.detach().flatten(1).double() for m in models)
        wanted = (emulator + 32 / 3 * b @ a) @ x
        ours = (base + 32 / 3 * after[name][0] @ a) @ x
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
        assert ((base + 32 / 3 * b @ a) @ x - wanted).norm() > 0.05 * wanted.norm()


def corrected(toy, folder, **options):
    given = {"adapter": str(toy.stages["adapter"]), "emulator": str(toy.stages["emulator"])}
    return emloc.correct(output_dir=folder, **{**given, **toy.data, **options})


def test_the_best_of_all_limits_is_chosen_on_data(toy, tmp_path):
    """The choice is made on one half and checked on the other; the table of losses is of all samples."""
    summary = Manifest.read(corrected(toy, tmp_path / "auto", limit="auto")).summary
    table = summary["calibration_loss"]
    assert summary["limit"] == chosen_limit(summary)
    assert table[summary["limit"]] <= table["0"]
    base = toy.example["model_name_or_path"]
    for limit in ("0", "1", "none"):
        adapter = corrected(toy, tmp_path / limit, limit=limit)
        loss = emloc.evaluate(model_name_or_path=base, adapter=str(adapter), **toy.data)["loss"]
        assert table[limit] == pytest.approx(loss, rel=1e-5)
    score = {"model_name_or_path": base, "adapter": str(toy.stages["adapter"]), **toy.data}
    with pytest.raises(MismatchError, match="not corrected"):
        emloc.evaluate(**score)
    plain = emloc.evaluate(allow_mismatch=True, **score)["loss"]
    assert table["0"] == pytest.approx(plain, rel=1e-6)


def test_what_does_not_belong_together_is_refused(toy, tmp_path):
    emulator = emloc.compress(
        output_dir=tmp_path / "e", format="low_rank", keep_ratio=0.4, **toy.example
    )
    with pytest.raises(MismatchError, match="was trained on"):
        corrected(toy, tmp_path / "c", limit="none", emulator=str(emulator))
    with pytest.raises(MismatchError, match="already corrected"):
        corrected(toy, tmp_path / "c", limit="none", adapter=str(toy.stages["corrected"]))
    with pytest.raises(MismatchError, match="is not corrected"):
        emloc.merge(adapter=str(toy.stages["adapter"]), output_dir=tmp_path / "m")
    with pytest.raises(ConfigError, match="compares limits on data"):
        corrected(toy, tmp_path / "c", dataset=None)
    assert {path.name for path in tmp_path.iterdir()} == {"e"}


def test_training_obeys_its_options_or_refuses_them(toy, tmp_path):
    def trained(**options):
        given = {"emulator": str(toy.stages["emulator"]), "max_steps": 1, **toy.data}
        return emloc.train(output_dir=tmp_path / "a", **{**given, **options})

    with pytest.raises(ConfigError, match="does not read use_dora"):
        trained(use_dora=True)
    with pytest.raises(ConfigError, match=r"no module gat\. Did you mean gate"):
        trained(lora_target_modules=["gat"])
    assert not (tmp_path / "a").exists()
    adapter = trained(
        lora_target_modules=["gate", "2.conv"], lora_r=2, lora_alpha=6, use_rslora=True
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 6, True)
    assert sorted(factors(adapter)) == sorted(config["target_modules"]) == [
        "blocks.0.gate", "blocks.1.gate", "blocks.2.conv", "blocks.2.gate"]  # fmt: skip
    assert Manifest.read(adapter).emulator.name_or_path == str(toy.stages["emulator"])


def test_a_run_of_all_stages_is_each_by_itself(toy, tmp_path):
    """One mapping of options, as a YAML file holds them."""
    made = emloc.run(
        {
            **toy.example,
            "output_dir": str(tmp_path / "run"),
            "compress": {"format": "low_rank", "keep_ratio": 0.5},
            "train": {"max_steps": 2, "learning_rate": 1e-2, "lora_r": 3},
            "correct": {"limit": "none"},
            "merge": None,
            "evaluate": {},
        }
    )
    assert set(made) == {"compress", "train", "correct", "merge", "evaluate"}
    file = "model.safetensors"
    ours, theirs = (load_file(f / file) for f in (tmp_path / "run/merged", toy.stages["merged"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert made["evaluate"]["samples"] == 24


@pytest.mark.parametrize("lacking", ["plan", "memory", "disk"])
def test_what_does_not_fit_is_refused_before_the_work(toy, tmp_path, monkeypatch, lacking):
    memory = "1GiB"
    if lacking == "plan":
        memory, said = "1MiB", "compress needs .* with the smallest settings it needs"
    elif lacking == "disk":
        monkeypatch.setattr(contracts, "disk_usage", lambda path: SimpleNamespace(free=1 << 10))
        said = r"compress needs .* of the disk of .*, of which 1.0 KiB are free"
    else:
        low = SimpleNamespace(available=1 << 20)
        monkeypatch.setattr(contracts.psutil, "virtual_memory", lambda: low)
        said = "compress needs .* of the machine's memory, of which 1.0 MiB are free"
    with pytest.raises(MemoryLimitError, match=said):
        emloc.compress(
            output_dir=tmp_path / "e",
            format="low_rank",
            keep_ratio=0.5,
            memory=memory,
            **toy.example,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_device_changes_nothing(toy, tmp_path):
    """All stages on a pretended CUDA device write the bytes that they write on the CPU."""
    with pretend_device() as card:
        emulator = emloc.compress(
            output_dir=tmp_path / "emulator",
            format="low_rank",
            keep_ratio=0.5,
            device="cuda",
            **toy.example,
        )
        adapter = shutil.copytree(toy.stages["adapter"], tmp_path / "adapter")
        there = corrected(
            toy, tmp_path / "corrected", limit="none", device="cuda", emulator=str(emulator),
            adapter=str(adapter),
        )  # fmt: skip
        assert card.live_bytes == card.unfinished == 0
        assert card.peak_bytes > 0
        trained = emloc.train(
            emulator=str(emulator), output_dir=tmp_path / "trained", max_steps=2, lora_r=3,
            learning_rate=1e-2, device="cuda", **toy.data,
        )  # fmt: skip
    for name, folder in (("emulator", emulator), ("corrected", there)):
        for path in toy.stages[name].glob("*.safetensors"):
            assert (folder / path.name).read_bytes() == path.read_bytes()
    ours, theirs = factors(trained), factors(toy.stages["adapter"])
    for name, pair in theirs.items():
        torch.testing.assert_close(ours[name], pair, rtol=1e-3, atol=1e-4)
