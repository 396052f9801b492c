"""Stages that are planned before they begin, refused if they cannot fit, and held to what they may take."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from warm_python import run_python

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.errors import MemoryLimitError
from emloc.planning import contract as contracts
from emloc.planning.ledger import total
from emloc_llm.example import write_model, write_rows


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose weights are more than the constants of a plan."""
    root = tmp_path_factory.mktemp("wide")
    base = write_model(root / "base", hidden_size=256, intermediate_size=1024, num_hidden_layers=3)
    return SimpleNamespace(root=root, base=base, data=write_rows(root / "train.jsonl", 24, seed=1))


def run_options(wide, out, **sections):
    return {
        "model_name_or_path": str(wide.base), "dataset": str(wide.data), "output_dir": str(out),
        "max_length": 96, "train": {"max_steps": 2, "per_device_train_batch_size": 2},
        "compress": {}, "correct": {"num_calibration_samples": 8}, "merge": {}, **sections,
    }  # fmt: skip


def test_every_stage_of_a_run_is_planned_measured_and_kept_to(wide, tmp_path, capsys):
    emloc.run(run_options(wide, tmp_path / "run", memory="200MiB"))
    said = " ".join(capsys.readouterr().err.split())
    assert "run: Fits in 200.0 MiB with format auto, keep_ratio 0.95. Nothing was given up." in said
    for stage, folder in (("compress", "emulator"), ("train", "adapter"),
                          ("correct", "corrected"), ("merge", "merged")):  # fmt: skip
        manifest = Manifest.read(tmp_path / "run" / folder)
        assert 0 < manifest.measured["planned_bytes"] <= 200 << 20
        assert manifest.measured["peak_bytes"] <= 200 << 20
        assert f"{stage}: planned " in said
        assert "memory" not in manifest.settings
    assert Manifest.read(tmp_path / "run/emulator").settings["keep_ratio"] == 0.95
    again = emloc.run(run_options(wide, tmp_path / "run", memory="200MiB"))
    assert "is complete already" in capsys.readouterr().err
    assert set(again) == {"compress", "train", "correct", "merge"}


def test_compressing_beside_the_emulator_is_planned(wide, tmp_path):
    """The emulator's calls, and what layers read in the base: what is planned for them is what they take."""
    options = {
        "model_name_or_path": str(wide.base), "dataset": str(wide.data), "max_length": 96,
        "num_calibration_samples": 24, "format": "quantized", "bits": 3,
    }  # fmt: skip
    emloc.compress(output_dir=tmp_path / "before", **options)
    planned, measured = [], []
    for propagate in (False, True):
        made = emloc.compress(
            output_dir=tmp_path / f"{propagate}",
            memory="400MiB",
            propagate_errors=propagate,
            **options,
        )
        figures = Manifest.read(made).measured
        planned.append(figures["planned_bytes"])
        measured.append(figures["peak_bytes"])
    assert all(peak <= plan for peak, plan in zip(measured, planned))
    more = measured[1] - measured[0]
    assert 0.8 * more <= planned[1] - planned[0] <= 2 * more


def test_what_was_asked_for_stays_and_the_rest_is_chosen(wide, tmp_path, capsys):
    """Less memory than the defaults take: what was not set is given up, what was set is not."""
    options = run_options(wide, tmp_path / "run")
    del options["correct"], options["merge"]
    options["train"] = {"max_steps": 1}
    whole = most_of(wide, tmp_path)
    emloc.run(options, f"memory={int(0.8 * whole)}")
    made = Manifest.read(tmp_path / "run/adapter")
    assert made.measured["gradient_checkpointing"]
    assert made.settings["max_length"] == 96
    assert "Given up to fit, in this order: gradient_checkpointing" in " ".join(
        capsys.readouterr().err.split()
    )
    options["train"]["gradient_checkpointing"] = False
    options["output_dir"] = str(tmp_path / "other")
    emloc.run(options, f"memory={int(0.8 * whole)}")
    made = Manifest.read(tmp_path / "other/adapter")
    assert not made.measured["gradient_checkpointing"]
    settings = made.settings
    assert settings["per_device_train_batch_size"] == 1
    assert settings["gradient_accumulation_steps"] == 8


def most_of(wide, tmp_path):
    """What the stage that takes most takes with the defaults, at the smallest ratio."""
    found = emloc.plan(
        model_name_or_path=str(wide.base), device="cpu", max_length=96, keep_ratio=0.25
    )
    return max(found["stages"][name]["device_bytes"]["total"] for name in ("compress", "train"))


def test_a_run_that_cannot_fit_is_refused_before_any_work(wide, tmp_path):
    with pytest.raises(MemoryLimitError, match=r"Nothing fits in 8.0 MiB: the smallest need is .* MiB, "
                                               r"mostly .* of \w+\. Tried"):  # fmt: skip
        emloc.run(run_options(wide, tmp_path / "run", memory="8MiB"))
    assert not (tmp_path / "run").exists()


def test_a_stage_that_cannot_fit_says_what_would(wide, tmp_path):
    common = {"model_name_or_path": str(wide.base), "dataset": str(wide.data), "device": "cpu",
              "max_length": 96, "output_dir": tmp_path / "x"}  # fmt: skip
    whole = emloc.plan(model_name_or_path=str(wide.base), device="cpu", max_length=96)
    lora = whole["beside"]["LoRA on the base"]["device_bytes"]["total"]
    with pytest.raises(MemoryLimitError, match="train needs .* it would fit with "
                                               "gradient_checkpointing=True"):  # fmt: skip
        emloc.train(memory=lora - 1, gradient_checkpointing=False, **common)
    with pytest.raises(MemoryLimitError, match="with the smallest settings it needs") as refused:
        emloc.train(memory="1MiB", **common)
    assert "\n  weights " in str(refused.value)
    with pytest.raises(MemoryLimitError, match="compress needs"):
        emloc.compress(memory="1MiB", keep_ratio=0.5, **common)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_the_machine_has_to_have_it_too(wide, tmp_path, lacking, monkeypatch):
    if lacking == "disk":
        monkeypatch.setattr(contracts, "disk_usage", lambda path: SimpleNamespace(free=1 << 10))
        said = r"compress needs .* of the disk of .*, of which 1.0 KiB are free; choose another"
    else:
        low = SimpleNamespace(available=1 << 20)
        monkeypatch.setattr(contracts.psutil, "virtual_memory", lambda: low)
        said = "compress needs .* of the machine's memory, of which 1.0 MiB are free; close"
    with pytest.raises(MemoryLimitError, match=said):
        emloc.compress(
            model_name_or_path=str(wide.base), dataset=str(wide.data), max_length=96,
            memory="1GiB", keep_ratio=0.5, output_dir=tmp_path / "x",
        )  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_contracts_of_artefacts_are_of_what_they_hold(tiny, tmp_path):
    """The emulator's bytes and the adapter's matrices, as they lie on the disk."""
    seen = {}

    def remember(name, *given):
        seen[name] = contracts.contract_for(name, *given)
        return seen[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["emloc.stages.stage"], "contract_for", remember)
        emloc.train(output_dir=tmp_path / "a", memory="2GiB", **tiny.train_options)
        emloc.correct(output_dir=tmp_path / "c", memory="2GiB", **tiny.correct_options)
        emloc.merge(
            adapter=str(tiny.corrected), output_dir=tmp_path / "m", memory="2GiB",
            model_name_or_path=str(tiny.base),
        )  # fmt: skip
    emulator = Manifest.read(tiny.emulator).summary
    assert seen["train"].planned.device["weights"] == emulator["emulator_bytes"]
    tensors = load_file(tiny.corrected / "adapter_model.safetensors").values()
    for stage in ("correct", "merge"):
        assert seen[stage].setting.learnt == sum(tensor.numel() * 4 for tensor in tensors)
    assert seen["correct"].setting.candidates == 9
    # Where memory is short, ways go through one after another, and the outcome is the same.
    fewer = replace(seen["correct"].setting, candidates=3)
    allowed = total(fewer.stage(seen["correct"].lines).device)
    assert allowed < total(seen["correct"].planned.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["emloc.stages.stage"], "contract_for", remember)
        emloc.correct(output_dir=tmp_path / "few", memory=allowed, **tiny.correct_options)
    assert seen["correct"].setting.candidates == 3
    assert (tmp_path / "few/adapter_model.safetensors").read_bytes() == (
        tmp_path / "c/adapter_model.safetensors"
    ).read_bytes()
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tiny.adapter / "adapter_model.safetensors"
    ).read_bytes()


WITHOUT_REFUSAL = """
import sys
from emloc.planning.contract import Contract
Contract.require_room = lambda self, folder: None  # the plan is right, so it has to be kept quiet
from emloc.cli import main
main()
"""


@pytest.mark.parametrize("stage", ["compress", "train"])
def test_a_stage_that_goes_beyond_is_stopped_with_its_plan_and_goes_on_later(wide, tmp_path, stage):
    options = {"model_name_or_path": str(wide.base), "dataset": str(wide.data), "max_length": "96",
               "output_dir": str(tmp_path / "out")}  # fmt: skip
    own = {"compress": {"keep_ratio": "0.5", "num_calibration_samples": "24"},
           "train": {"max_steps": "2", "save_steps": "1"}}[stage]  # fmt: skip
    given = [f"--{name}={value}" for name, value in {**options, **own}.items()]
    stopped = run_python("-c", WITHOUT_REFUSAL, stage, *given, "--memory=4MiB")
    assert stopped.returncode == 10, stopped.stderr
    assert f"error: {stage} was stopped. It needs more than memory=4.0 MiB" in stopped.stderr
    assert "\n  planned " in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "out").exists()
    done = getattr(emloc, stage)(**{**options, **own})
    assert json.loads((done / "emloc.json").read_text())["files"]
