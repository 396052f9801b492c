"""Rows of texts and classes: how they are read, what is refused, and how they are scored."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

import emloc
from emloc.plugin import ConfigError, DataError
from emloc.testing import plugin_installed
from emloc_encoder.example import CLASSES, write_example
from emloc_encoder.rows import labelled_rows

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]


@pytest.fixture(autouse=True)
def _hooks() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """The plugin, where pip has not installed it."""
    with plugin_installed("emloc_encoder_hooks"):
        yield


def _scores(folder: Path, *rows: Mapping[str, Any]) -> dict[str, Any]:
    """Scores of the example's model on these rows."""
    options = dict(write_example(folder, 0))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return emloc.evaluate(**{**options, "dataset": str(data), "device": "cpu"})


@pytest.mark.parametrize("second", [1, "1", CLASSES[1]])
def test_a_label_is_a_number_or_a_name(tmp_path: Path, second: object) -> None:
    by_number = _scores(tmp_path, {"text": "word", "label": 0}, {"text": "other", "label": 1})
    scores = _scores(tmp_path, {"text": "word", "label": 0}, {"text": "other", "label": second})
    assert scores["loss"] == by_number["loss"]


def _config(**given: Any) -> Any:
    return SimpleNamespace(label2id={"1": 0, "2": 1, "3": 2}, **given)


def _options(folder: Path, *rows: Mapping[str, Any]) -> Any:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return SimpleNamespace(dataset=str(data), dataset_split="train", column_map={})


def test_classes_may_be_named_by_digits(tmp_path: Path) -> None:
    """A number is a class's number, as in transformers, and text is its name first."""
    labels = [0, 1, 2, "1", "2", "3", "0"]
    options = _options(tmp_path, *({"text": "a", "label": label} for label in labels[:3]))
    assert [row.label for row in labelled_rows(options, _config())] == [0, 1, 2]
    options = _options(tmp_path, *({"text": "a", "label": label} for label in labels[3:]))
    assert [row.label for row in labelled_rows(options, _config())] == [0, 1, 2, 0]


@pytest.mark.parametrize("column", ["text", "text_pair", "label"])
@pytest.mark.parametrize("value", [{"a": 1}, [1, True], True, 1.5])
def test_what_is_no_text_is_refused(tmp_path: Path, column: str, value: object) -> None:
    row = {"text": "word", "text_pair": "pair", "label": 0, column: value}
    with pytest.raises(DataError, match=f"row 1: {column} is .* should be text"):
        list(labelled_rows(_options(tmp_path, row), _config()))


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_models_of_other_problems_are_refused(tmp_path: Path, problem: str) -> None:
    options = _options(tmp_path, {"text": "word", "label": 0})
    with pytest.raises(ConfigError, match=f"problem_type='{problem}'"):
        list(labelled_rows(options, _config(problem_type=problem)))


@pytest.mark.parametrize("label", [3, -1, "fourth"])
def test_an_unknown_label_is_refused(tmp_path: Path, label: object) -> None:
    with pytest.raises(DataError, match=f"row 2 has the label '{label}'.* first, second, third"):
        _scores(tmp_path, {"text": "word", "label": 0}, {"text": "word", "label": label})


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_missing_column_is_refused(tmp_path: Path, column: str) -> None:
    row = {name: value for name, value in (("text", "word"), ("label", 0)) if name != column}
    with pytest.raises(DataError, match=f"row 1 has no '{column}'; its columns are"):
        _scores(tmp_path, row)


def test_accuracy_and_loss_are_those_of_plain_transformers(tmp_path: Path) -> None:
    options = write_example(tmp_path, 0)
    rows = [json.loads(line) for line in Path(options["dataset"]).read_text().splitlines()]
    scores = emloc.evaluate(**options, device="cpu", per_device_eval_batch_size=5)
    model = AutoModelForSequenceClassification.from_pretrained(options["model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(options["model_name_or_path"])
    right, losses = 0, 0.0
    for row in rows:
        label = row["label"] if isinstance(row["label"], int) else CLASSES.index(row["label"])
        with torch.no_grad():
            result = model(
                **tokenizer(row["text"], return_tensors="pt"), labels=torch.tensor([label])
            )
        right += int(result.logits.argmax()) == label
        losses += float(result.loss)
    assert scores["accuracy"] == right / len(rows)
    assert scores["loss"] == pytest.approx(losses / len(rows), rel=1e-5)


def test_the_second_text_of_a_pair_is_another_segment(tmp_path: Path) -> None:
    model = str(write_example(tmp_path, 0)["model_name_or_path"])
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(model)
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"text": "a b", "text_pair": "b", "label": 2}) + "\n", "utf-8")
    scores = emloc.evaluate(model_name_or_path=model, dataset=str(data), device="cpu")
    plain = AutoModelForSequenceClassification.from_pretrained(model)
    ids, segments = torch.tensor([[2, 5, 6, 3, 6, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1]])
    with torch.no_grad():
        result = plain(input_ids=ids, token_type_ids=segments, labels=torch.tensor([2]))
    assert scores["loss"] == pytest.approx(float(result.loss), rel=1e-5)
