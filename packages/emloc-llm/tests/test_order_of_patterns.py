"""The first pattern that matches a layer counts: in training, in saved files, and in a run's settings."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import emloc
from emloc.errors import OutputError
from emloc.integrations.transformers import lora_training
from emloc.planning.training import STEPS
from emloc_llm.example import write_model, write_rows

TOKENS = torch.arange(4, 40).view(2, 18)


@pytest.fixture
def tiny(tmp_path):
    write_model(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", 8, seed=1)
    return tmp_path


def options(tiny, **more):
    return {"model_name_or_path": str(tiny / "base"), "dataset": str(tiny / "train.jsonl"), "max_length": 64,
            "device": "cpu", **more}  # fmt: skip


def trained(tiny, **more):
    return emloc.train(
        output_dir=tiny / "a", max_steps=2, lora_r=4, lora_alpha=8, learning_rate=2e-2,
        per_device_train_batch_size=4, lora_target_modules="q_proj,down_proj", **options(tiny, **more),
    )  # fmt: skip


@pytest.mark.parametrize(
    "patterns",
    [
        {"lora_alpha_pattern": "q_proj=4,.*_proj=64"},
        {"lora_rank_pattern": "q_proj=2,.*_proj=6"},
        {"lora_rank_pattern": "q_proj=2,.*_proj=6", "lora_init": "eva"},
        {"lora_alpha_pattern": "q_proj=2,.*_proj=6", "lora_init": "eva"},
        {"lora_rank_pattern": "q_proj=2,.*_proj=6", "lora_init": "pissa"},
        {
            "lora_rank_pattern": "q_proj=2,.*_proj=6",
            "lora_alpha_pattern": "q_proj=3,.*_proj=5",
            "use_rslora": True,
        },
    ],
)
def test_the_saved_lora_is_the_trained_one(tiny, monkeypatch, patterns):
    """PEFT saves patterns in alphabetical order, and `.` comes before all letters."""
    seen = {}
    check = lora_training._require_finite

    def spy(model):
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids=TOKENS).logits
        check(model)

    monkeypatch.setattr(lora_training, "_require_finite", spy)
    adapter = trained(tiny, **patterns)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny / "base"), adapter
    ).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            stock(input_ids=TOKENS).logits, seen["logits"], rtol=1e-4, atol=1e-4
        )
    merged = emloc.merge(adapter=str(adapter), output_dir=tiny / "m")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merged).eval()(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-3, atol=1e-3)


def test_patterns_that_do_not_overlap_stay_as_they_were_given(tiny):
    adapter = trained(tiny, lora_alpha_pattern="q_proj=4,down_proj=64")
    written = json.loads((adapter / "adapter_config.json").read_text())["alpha_pattern"]
    assert written == {"q_proj": 4, "down_proj": 64}


def test_another_order_is_another_emulator(tiny):
    more = options(tiny, output_dir=tiny / "e", format="low_rank", num_calibration_samples=8)
    emloc.compress(rank_pattern="q_proj=4,.*_proj=9", **more)
    emloc.compress(rank_pattern="q_proj=4,.*_proj=9", **more)
    with pytest.raises(OutputError, match="was made with rank_pattern"):
        emloc.compress(rank_pattern=".*_proj=9,q_proj=4", **more)


def test_an_interrupted_run_knows_its_order(tiny, monkeypatch):
    from emloc.compression.emulator_folder import EmulatorFolder

    write, count = EmulatorFolder.write_block, []

    def killed(self, block, *given):
        if len(count) == 1:
            raise KeyboardInterrupt
        count.append(block)
        write(self, block, *given)

    more = options(tiny, output_dir=tiny / "e", format="low_rank", num_calibration_samples=8)
    monkeypatch.setattr(EmulatorFolder, "write_block", killed)
    with pytest.raises(KeyboardInterrupt):
        emloc.compress(rank_pattern="q_proj=4,.*_proj=9", **more)
    monkeypatch.setattr(EmulatorFolder, "write_block", write)
    with pytest.raises(OutputError, match="interrupted run with other settings"):
        emloc.compress(rank_pattern=".*_proj=9,q_proj=4", **more)
    assert emloc.compress(rank_pattern="q_proj=4,.*_proj=9", **more).is_dir()


def test_a_plan_of_another_order_is_another_plan(tiny):
    """Steps that are traced are remembered within a process, by all that they depend on."""
    more = {
        "model_name_or_path": str(tiny / "base"),
        "max_length": 64,
        "device": "cpu",
        "use_dora": True,
    }

    def planned(patterns):
        return emloc.plan(lora_rank_pattern=patterns, **more)["ways"][0]["device_bytes"]

    planned("q_proj=2,.*_proj=48")
    remembered = planned(".*_proj=48,q_proj=2")
    STEPS._answers.clear()
    assert remembered == planned(".*_proj=48,q_proj=2")
