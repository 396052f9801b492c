"""Scores against direct computation, and how answers are compared."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from llm_reference import load

import emloc
from emloc.errors import CheckpointError, ConfigError, MismatchError
from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.testing.resealed import resealed
from emloc_llm.evaluation import matches
from emloc_llm.example import write_model


@pytest.mark.parametrize(
    ("reference", "prediction", "answer", "same"),
    [
        ("so 3+4=7\n#### 7", "The answer is 7", "auto", True),
        ("#### 1,200", "#### 1200.0", "auto", True),
        ("#### 72", "first 72, then\n#### 71", "auto", False),
        ("#### 72", "no idea", "auto", False),
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1}', "auto", True),
        ('{"a": 1}', '{"a": 2}', "auto", False),
        ('{"a": 1}', "a is 1", "auto", False),
        ("yes", " yes\n", "auto", True),
        ("[1] see", "[1] see", "auto", True),
        ("yes", "Yes", "text", False),
        ("12", "it is 12", "number", True),
        ("half of 6\n#### c", "a, then\n#### C)", "auto", True),
        ("half of 6\n#### c", "#### c at first\n#### d", "auto", False),
        ("#### c", "c", "auto", False),
        ("#### A heading", "#### A title", "auto", False),
    ],
)
def test_matches(reference, prediction, answer, same):
    assert matches(reference, prediction, answer) is same


def test_loss_and_answers_are_those_of_a_plain_loop(tiny):
    result = emloc.evaluate(
        model_name_or_path=str(tiny.base), dataset=str(tiny.test), max_new_tokens=6,
        per_device_eval_batch_size=5,
    )  # fmt: skip
    model, tokenizer = load(tiny.base), byte_tokenizer()
    total, count = 0.0, 0
    rows = [json.loads(line)["messages"] for line in tiny.test.read_text().splitlines()]
    for row, answer in zip(rows, result["answers"]):
        head = tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(head, return_tensors="pt")["input_ids"]
        rest = tokenizer(row[-1]["content"] + "<|im_end|>\n", return_tensors="pt")["input_ids"]
        ids = torch.cat([prompt, rest], 1)
        loss = model(input_ids=ids, labels=torch.cat([torch.full_like(prompt, -100), rest], 1)).loss
        total, count = total + float(loss) * rest.shape[1], count + rest.shape[1]
        out = model.generate(prompt, max_new_tokens=6, do_sample=False)
        said = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert answer["prediction"] == said
        assert answer["match"] == (said == row[-1]["content"])
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["samples"] == len(rows) == 8


def test_several_data_sets_are_evaluated_one_after_the_other(tiny, tmp_path):
    lines = tiny.test.read_text().splitlines()
    parts = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, part in zip(parts, (lines[:3], lines[3:])):
        path.write_text("\n".join(part) + "\n")
    options = {"model_name_or_path": str(tiny.base), "max_length": 96, "max_new_tokens": 0}
    for count in (None, 2, 5):
        whole = emloc.evaluate(dataset=str(tiny.test), num_samples=count, **options)
        both = emloc.evaluate(dataset=",".join(map(str, parts)), num_samples=count, **options)
        assert both["samples"] == whole["samples"] == (count or len(lines))
        assert both["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_tasks_are_lm_evals_with_paths_as_they_are(tiny, tmp_path, monkeypatch):
    """Its own text form would cut a path at a comma."""
    asked = {}

    def simple_evaluate(**options):
        asked.update(options)
        return {"results": {"arc": {"acc": 1.0}}}

    monkeypatch.setitem(sys.modules, "lm_eval", SimpleNamespace(simple_evaluate=simple_evaluate))
    base = shutil.copytree(tiny.base, tmp_path / "a,b=c")
    scores = emloc.evaluate(model_name_or_path=str(base), tasks=["arc"], num_samples=3)
    assert scores["tasks"] == {"arc": {"acc": 1.0}}
    assert asked["model_args"] == {"pretrained": str(base), "dtype": "auto"}
    assert (asked["tasks"], asked["limit"]) == (["arc"], 3)


def test_written_once_and_refused(tiny, tmp_path):
    options = {"model_name_or_path": str(tiny.base), "dataset": str(tiny.test),
               "max_new_tokens": 0, "output_dir": tmp_path}  # fmt: skip
    first = emloc.evaluate(adapter=str(tiny.corrected), **options)
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written == {**first, "seal": written["seal"]}
    assert emloc.evaluate(adapter=str(tiny.corrected), **options) == first
    elsewhere = {**options, "output_dir": tmp_path / "copy"}
    shutil.copytree(tiny.corrected, tmp_path / "lora")
    emloc.evaluate(adapter=str(tmp_path / "lora"), **elsewhere)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1}))
    with pytest.raises(CheckpointError, match="not what was written"):
        emloc.evaluate(adapter=str(tmp_path / "lora"), **elsewhere)
    resealed(tmp_path / "lora")
    with pytest.raises(
        OSError, match="was made with another adapter"
    ):  # the path is the same, it is not
        emloc.evaluate(adapter=str(tmp_path / "lora"), **elsewhere)
    with pytest.raises(OSError, match="was made with another adapter"):
        emloc.evaluate(**options)
    with pytest.raises(ConfigError, match="dataset is required"):
        emloc.evaluate(model_name_or_path=str(tiny.base))
    with pytest.raises(MismatchError, match="corrected for the original"):
        emloc.evaluate(
            model_name_or_path=str(tiny.emulator), adapter=str(tiny.corrected),
            dataset=str(tiny.test),
        )  # fmt: skip
    deep = write_model(tmp_path / "deep", num_hidden_layers=2)
    given = {"adapter": str(tiny.corrected), "dataset": str(tiny.test)}
    with pytest.raises(MismatchError, match="the weights of .* are different"):
        emloc.evaluate(model_name_or_path=str(deep), **given)
    with pytest.raises(MismatchError, match="7 of 21 layers have no weight"):
        emloc.evaluate(model_name_or_path=str(deep), allow_mismatch=True, **given)
    with pytest.raises(CheckpointError):
        emloc.evaluate(model_name_or_path=str(tmp_path / "none" / "x"), dataset=str(tiny.test))


def test_emulators_with_and_without_their_adapter(tiny):
    """Under inference_mode, where tensors count no versions."""
    model = load(tiny.emulator)
    options = {"model_name_or_path": str(tiny.emulator), "dataset": str(tiny.test)}
    plain = emloc.evaluate(max_new_tokens=4, **options)
    with torch.inference_mode():
        for row, answer in zip(tiny.test.read_text().splitlines(), plain["answers"]):
            turns = json.loads(row)["messages"][:-1]
            tokenizer = byte_tokenizer()
            head = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(head, return_tensors="pt")["input_ids"]
            out = model.generate(ids, max_new_tokens=4, do_sample=False)
            said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
            assert answer["prediction"] == said
    adapted = emloc.evaluate(adapter=str(tiny.adapter), max_new_tokens=0, **options)
    assert adapted["loss"] < plain["loss"]


def test_answers_may_be_fewer_than_samples(tiny):
    data = {"dataset": str(tiny.test), "max_length": 96, "max_new_tokens": 2}
    every = emloc.evaluate(model_name_or_path=str(tiny.base), **data)
    some = emloc.evaluate(model_name_or_path=str(tiny.base), num_answers=3, **data)
    assert some["answers"] == every["answers"][:3]
    assert len(every["answers"]) == some["samples"] == 8
    assert some["loss"] == every["loss"]


def test_a_data_set_beside_tasks_is_scored_too(tiny, monkeypatch):
    results = SimpleNamespace(simple_evaluate=lambda **_: {"results": {"arc": {"acc": 1.0}}})
    monkeypatch.setitem(sys.modules, "lm_eval", results)
    own = {"model_name_or_path": str(tiny.base), "dataset": str(tiny.test), "max_new_tokens": 0}
    both = emloc.evaluate(tasks=["arc"], **own)
    assert both["tasks"] == {"arc": {"acc": 1.0}}
    assert both["loss"] == emloc.evaluate(**own)["loss"]


def test_weights_change_nothing_where_all_is_scored(tiny, capsys):
    """A run shares them among its stages, so they are no reason to stop."""
    own = {"model_name_or_path": str(tiny.base), "dataset": f"{tiny.test},{tiny.data}"}
    weighed = emloc.evaluate(dataset_weights=[1, 3], max_new_tokens=0, **own)
    said = "every sample of every data set is scored once, whatever dataset_weights says"
    assert said in " ".join(capsys.readouterr().err.split())
    assert weighed["loss"] == emloc.evaluate(max_new_tokens=0, **own)["loss"]
