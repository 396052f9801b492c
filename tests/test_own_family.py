"""The defaults that `TransformersFamily` gives a family of one's own: right or refused, never ignored."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import create_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import CompressConfig, EvaluateConfig, TrainConfig
from emloc.errors import ConfigError, DataError, PluginError
from emloc.extend.capabilities import Evaluates
from emloc.extend.family import REQUIRED, FamilyEntry
from emloc.plugin import (
    EvaluationDataOptions,
    LengthOptions,
    LossSum,
    RowOptions,
    SplitOptions,
    TaskOptions,
    TokenCountOptions,
)
from emloc.testing import FamilyContract
from emloc.testing.contract.training_laws import LEARNING

own = pytest.mark.parametrize("subject", ["classifier"], indirect=True, scope="session")


@own
def test_options_that_the_defaults_do_not_read_are_refused(family, example, tmp_path):
    data = {key: value for key, value in example.items() if key != "model_name_or_path"}
    with pytest.raises(ConfigError, match="num_calibration_tokens is an option of the family llm"):
        emloc.compress(output_dir=tmp_path / "e", num_calibration_tokens=10, **example)
    with pytest.raises(ConfigError, match="streaming is an option of the family llm"):
        emloc.train(output_dir=tmp_path / "a", streaming=True, max_steps=1, **example)
    with pytest.raises(ConfigError, match="eval_dataset is an option of the family llm"):
        emloc.train(output_dir=tmp_path / "a", eval_dataset=data["dataset"], max_steps=1, **example)
    with pytest.raises(ConfigError, match="tasks is an option of the family llm, but the"):
        emloc.evaluate(tasks=["hellaswag"], **example)


@own
def test_options_that_a_family_registers_and_leaves_to_the_defaults_are_refused(
    family, example, tmp_path
):
    kinds = {
        stage: create_model(stage.__name__, __base__=(stage, *parts))
        for stage, parts in {
            CompressConfig: (SplitOptions, LengthOptions, TokenCountOptions),
            TrainConfig: (SplitOptions, LengthOptions, RowOptions, EvaluationDataOptions),
            EvaluateConfig: (SplitOptions, LengthOptions, TaskOptions),
        }.items()
    }
    checkpoint = Checkpoint.open(example["model_name_or_path"])
    whole = {"output_dir": tmp_path / "o", **example}
    with pytest.raises(ConfigError, match="does not read num_calibration_tokens"):
        options = kinds[CompressConfig](num_calibration_tokens=10, **whole)
        family.calibration_batches(checkpoint, options)
    for option in ({"streaming": True}, {"eval_dataset": example["dataset"]}):
        with pytest.raises(ConfigError, match=f"does not read {next(iter(option))}"):
            family.train(kinds[TrainConfig](max_steps=1, **option, **whole), tmp_path)
    with pytest.raises(ConfigError, match="does not read tasks"):
        family.evaluate(kinds[EvaluateConfig](tasks=["hellaswag"], **whole))


@own
def test_an_emulator_has_the_blocks_of_its_base(subject):
    """So that `frozen` may ask for them, whichever model a LoRA goes on."""
    emulator = subject.family.load(Checkpoint.open(str(subject.emulator)), "float32", "cpu")
    blocks = subject.family.blocks(subject.skeleton)
    assert len(blocks) == 3
    assert subject.family.blocks(emulator) == blocks


@own
def test_samples_longer_than_the_model_are_refused_and_not_planned(example, tmp_path):
    """Sixty-four positions: more tokens would be an index error on the way, and on a GPU an obscure one."""
    rows = [{"text": "a long word " * 9, "label": 0}, {"text": "short", "label": 1}]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    given = {**example, "dataset": str(tmp_path / "long.jsonl"), "max_length": 100}
    says = "The samples: one has 100 tokens, but the model has 64 positions; pass max_length=64, or less"
    with pytest.raises(DataError, match=says):
        emloc.compress(output_dir=tmp_path / "e", **given)
    with pytest.raises(DataError, match=says):
        emloc.train(output_dir=tmp_path / "a", max_steps=1, **given)
    with pytest.raises(DataError, match=says):
        emloc.evaluate(**given)
    assert emloc.evaluate(**{**given, "max_length": 64})["samples"] == 2


@own
def test_a_plan_of_longer_samples_than_fit_is_that_of_the_longest(family, example):
    checkpoint = Checkpoint.open(example["model_name_or_path"])
    lengths = {
        asked: family.planned_batch(checkpoint, LengthOptions(max_length=asked), 2)[
            "input_ids"
        ].shape
        for asked in (32, 64, 1024)
    }
    assert lengths == {32: (2, 32), 64: (2, 64), 1024: (2, 64)}


def losses_of(example):
    """Transformers' own loss of every row."""
    folder = example["model_name_or_path"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(example["dataset"]).read_text().splitlines()]
    losses = []
    for row in rows:
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            labels = torch.tensor([row["label"]])
            losses.append(float(model(**inputs, labels=labels).loss))
    return losses


@own
def test_the_first_samples_are_evaluated(family, example):
    """Against transformers' own loss, row by row."""
    losses = losses_of(example)[:5]
    scores = emloc.evaluate(num_samples=5, per_device_eval_batch_size=2, **example)
    assert scores["samples"] == 5
    assert scores["loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)


@own
def test_the_contract_sees_a_task_type_that_stock_peft_cannot_use(subject, tmp_path):
    """An encoder's adapter that says it is of a language model."""
    law = FamilyContract().test_stock_peft_puts_the_adapter_where_merging_does
    law(subject)
    for wrong in ("CAUSAL_LM", "no task"):
        folder = shutil.copytree(subject.corrected, tmp_path / wrong)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": wrong}))
        other = copy.copy(subject)
        other.corrected = folder
        with pytest.raises(Exception, match=r"prepare_inputs_for_generation|no task|PeftModel"):
            law(other)


class Bare:
    """A family with what is required of every one, and nothing else."""

    def __init__(self, family):
        for name in REQUIRED:
            setattr(self, name, getattr(family, name))


@own
def test_a_bare_family_is_evaluated_on_samples_drawn_by_seed(family, example, stages, monkeypatch):
    """All rows where more are asked for, and another number with a LoRA."""
    monkeypatch.setattr(FamilyEntry, "load", lambda entry: Bare(family))
    assert not isinstance(Bare(family), Evaluates)
    losses = losses_of(example)
    scores = emloc.evaluate(num_samples=100, per_device_eval_batch_size=5, **example)
    assert scores["samples"] == len(losses)
    assert scores["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    few = emloc.evaluate(num_samples=7, **example)
    assert few["samples"] == 7
    assert min(losses) < few["loss"] < max(losses)
    adapted = emloc.evaluate(adapter=str(stages["corrected"]), **example)
    merged = emloc.evaluate(**{**example, "model_name_or_path": str(stages["merged"])})
    assert adapted["loss"] == pytest.approx(merged["loss"], rel=1e-4)
    assert abs(adapted["loss"] - scores["loss"]) > 1e-4


@own
@pytest.mark.parametrize("option", LEARNING)
def test_training_that_a_family_inherits_obeys_options(subject, option, tmp_path):
    """The contract leaves it to this test, since it is core's for all families."""
    plain = load_file(subject.adapter / "adapter_model.safetensors")
    once, again = (
        load_file(
            subject.train(tmp_path / name, **{option: LEARNING[option]})
            / "adapter_model.safetensors"
        )
        for name in ("once", "again")
    )
    assert once.keys() == plain.keys()
    assert any(not torch.equal(once[name], plain[name]) for name in once)
    for name, tensor in once.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-6)


@own
def test_scores_that_mean_something_else_are_refused(family, example, monkeypatch):
    def scores(self, model, batch):
        return {"loss": LossSum(2.0, 1), name: LossSum(1.0, 2)}

    monkeypatch.setattr(type(family), "scores", scores, raising=False)
    name = "accuracy"
    made = emloc.evaluate(num_samples=4, **example)
    assert (made["loss"], made["accuracy"]) == (2.0, 0.5)
    name = "samples"
    with pytest.raises(PluginError, match="classifier scores loss, samples; there must be"):
        emloc.evaluate(num_samples=4, **example)


@own
def test_a_model_that_runs_no_block_twice_keeps_its_activations(
    subject, example, tmp_path, monkeypatch, capfd
):
    """A model such as ALBERT says so, is planned so, and learns the same adapter as without the option."""
    plain = subject.adapter
    kind = type(subject.family.load(subject.checkpoint, "float32", "cpu"))
    monkeypatch.setattr(kind, "supports_gradient_checkpointing", False)
    made = subject.train(tmp_path / "a", gradient_checkpointing=True)
    assert "does not support gradient_checkpointing" in " ".join(capfd.readouterr().err.split())
    ours, theirs = (load_file(one / "adapter_model.safetensors") for one in (made, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    plans = [
        emloc.plan(
            model_name_or_path=example["model_name_or_path"], max_length=32, gradient_checkpointing=asked
        )["stages"]["train"]
        for asked in (False, True)
    ]  # fmt: skip
    assert plans[0] == plans[1]
