"""The defaults that `TransformersFamily` gives a family of one's own: right or refused, never ignored."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import create_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import CompressConfig, EvaluateConfig, TrainConfig
from emloc.errors import ConfigError
from emloc.integrations.transformers.text_options import (
    EvaluationDataOptions,
    LengthOptions,
    RowOptions,
    SplitOptions,
    TaskOptions,
    TokenCountOptions,
)

own = pytest.mark.parametrize("family", ["classifier"], indirect=True, scope="session")


@own
def test_options_that_the_defaults_do_not_read_are_refused(family, example, tmp_path):
    data = {key: value for key, value in example.items() if key != "model_name_or_path"}
    with pytest.raises(ConfigError, match="num_calibration_tokens is an option of the family llm"):
        emloc.compress(output_dir=tmp_path / "e", num_calibration_tokens=10, **example)
    with pytest.raises(ConfigError, match="streaming is an option of the family llm"):
        emloc.train(output_dir=tmp_path / "a", streaming=True, max_steps=1, **example)
    with pytest.raises(ConfigError, match="eval_dataset is an option of the family llm"):
        emloc.train(output_dir=tmp_path / "a", eval_dataset=data["dataset"], max_steps=1, **example)
    with pytest.raises(ConfigError, match="tasks is an option of the family llm, and the"):
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
def test_the_first_samples_are_evaluated(family, example):
    """Against transformers' own loss, row by row."""
    folder = example["model_name_or_path"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).double().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(example["dataset"]).read_text().splitlines()]
    losses = []
    for row in rows[:5]:
        inputs = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            labels = torch.tensor([row["label"]])
            losses.append(float(model(**inputs, labels=labels).loss))
    scores = emloc.evaluate(num_samples=5, per_device_eval_batch_size=2, **example)
    assert scores["samples"] == 5
    assert scores["loss"] == pytest.approx(sum(losses) / 5, rel=1e-4)
