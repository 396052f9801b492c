"""The defaults that `TransformersFamily` gives a family of one's own: right or refused, never ignored."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import emloc
from emloc.errors import ConfigError

own = pytest.mark.parametrize("family", ["classifier"], indirect=True, scope="session")


@own
def test_options_that_the_defaults_do_not_read_are_refused(family, example, tmp_path):
    data = {key: value for key, value in example.items() if key != "model_name_or_path"}
    with pytest.raises(ConfigError, match="does not read num_calibration_tokens"):
        emloc.compress(output_dir=tmp_path / "e", num_calibration_tokens=10, **example)
    with pytest.raises(ConfigError, match="does not read streaming"):
        emloc.train(output_dir=tmp_path / "a", streaming=True, max_steps=1, **example)
    with pytest.raises(ConfigError, match="does not read eval_dataset"):
        emloc.train(output_dir=tmp_path / "a", eval_dataset=data["dataset"], max_steps=1, **example)
    with pytest.raises(ConfigError, match="does not read tasks"):
        emloc.evaluate(tasks=["hellaswag"], **example)


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
