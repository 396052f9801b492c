"""Data in the forms that people have, as token ids and labels."""

import json

import pytest

import emloc
from emloc.artefacts.manifest import Manifest
from emloc.config import CalibrationOptions, CompressConfig, TrainConfig
from emloc.errors import ConfigError, DataError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from emloc_llm.data import IGNORED, draw_samples, encode, load_samples
from emloc_llm.example import write_rows

TOKENIZER = byte_tokenizer()
TURNS = [
    ("system", "be brief"), ("user", "hi"), ("assistant", "yes"), ("user", "and?"),
    ("assistant", "no"),
]  # fmt: skip
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]


def options(**more):
    return with_plugin_options(TrainConfig)(output_dir="o", **more)


def learnt(sample):
    return TOKENIZER.decode([label for label in sample.labels if label != IGNORED])


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_sharegpt_is_the_same_chat():
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[role], "value": text} for role, text in TURNS]
    assert encode({"conversations": turns}, TOKENIZER, options()) == encode(
        {"messages": MESSAGES}, TOKENIZER, options()
    )
    apart = {"system": "be brief", "conversations": turns[1:]}
    assert encode(apart, TOKENIZER, options()) == encode(
        {"messages": MESSAGES}, TOKENIZER, options()
    )
    with pytest.raises(DataError, match="a turn from 'robot'"):
        encode({"conversations": [{"from": "robot", "value": ""}]}, TOKENIZER, options())


def test_alpaca_becomes_a_chat_or_a_prompt():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    chat = [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert encode(row, TOKENIZER, options()) == encode({"messages": chat}, TOKENIZER, options())
    plain = byte_tokenizer()
    plain.chat_template = None
    sample = encode({**row, "input": ""}, plain, options())
    assert plain.decode(sample.input_ids[: sample.prompt_length]) == "Add.\n\n"
    assert sample.reference == "3"


def test_loss_on_every_answer():
    sample = encode({"messages": MESSAGES}, TOKENIZER, options(assistant_only_loss=True))
    assert learnt(sample) == "yes<|im_end|>\nno<|im_end|>\n"
    both = options(assistant_only_loss=True, completion_only_loss=False)
    assert encode({"messages": MESSAGES}, TOKENIZER, both) == sample
    last = encode({"messages": MESSAGES}, TOKENIZER, options())
    assert learnt(last) == "no<|im_end|>\n"
    assert sample.input_ids == last.input_ids
    assert sample.prompt_length == last.prompt_length
    assert sample.reference == last.reference == "no"


def test_a_template_that_marks_answers_is_taken_by_its_word():
    marking = byte_tokenizer()
    marking.chat_template = CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}",
    )
    sample = encode({"messages": MESSAGES}, marking, options(assistant_only_loss=True))
    assert learnt(sample) == "yesno"
    assert sample.reference == "no"


def test_tools_reach_the_template():
    tooled = byte_tokenizer()
    tooled.chat_template = "{% if tools %}[{{ tools[0]['name'] }}]{% endif %}" + CHAT_TEMPLATE
    tools = [{"name": "weather", "parameters": {}}]
    for given in (tools, json.dumps(tools)):
        sample = encode({"messages": MESSAGES, "tools": given}, tooled, options())
        assert tooled.decode(sample.input_ids).startswith("[weather]<|im_start|>system")
    calls = [*MESSAGES[:2], {"role": "assistant", "tool_calls": [{"name": "weather"}]}]
    with pytest.raises(DataError, match="turn 3 calls a tool"):  # and would be an empty answer
        encode({"messages": calls}, tooled, options())
    tooled.chat_template = CHAT_TEMPLATE.replace(
        "<|im_end|>",
        "{% if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}<|im_end|>",
    )
    sample = encode({"messages": calls}, tooled, options())
    assert sample.reference == '[{"name": "weather"}]'
    assert learnt(sample) == '[{"name": "weather"}]<|im_end|>\n'


def test_several_data_sets_with_weights(tmp_path, capfd):
    small = write(tmp_path / "small.jsonl", [{"text": "aaaa"}] * 10)
    large = write(tmp_path / "large.jsonl", [{"prompt": "b", "completion": "b"}] * 60)
    both = f"{small},{large}"

    def count(samples):
        return sum(sample.reference is None for sample in samples), len(samples)

    assert count(load_samples(options(dataset=both), TOKENIZER, 0)) == (10, 70)
    even = options(dataset=[small, large], dataset_weights=[1, 1])
    mixed = load_samples(even, TOKENIZER, 0)
    assert count(mixed) == (60, 120)
    assert mixed == load_samples(even, TOKENIZER, 0) != load_samples(even, TOKENIZER, 1)
    assert "120 samples: 60 of" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(ValueError, match="1 weights for 2 data sets"):
        options(dataset=both, dataset_weights="1")


def test_calibration_by_tokens(tmp_path):
    data = str(write_rows(tmp_path / "d.jsonl", 50, seed=0))

    def drawn(**more):
        return draw_samples(
            with_plugin_options(CalibrationOptions)(dataset=data, **more), TOKENIZER
        )

    enough = drawn(num_calibration_tokens=500)
    count = [len(sample.input_ids) for sample in enough]
    assert sum(count[:-1]) < 500 <= sum(count)
    assert enough == drawn(num_calibration_samples=len(enough))
    assert drawn(seed=1, num_calibration_samples=3) != enough[:3]
    half = draw_samples(
        with_plugin_options(CalibrationOptions)(
            dataset=f"{data},{data}", dataset_weights=[3, 1], num_calibration_samples=8
        ),
        TOKENIZER,
    )
    assert half[:6] == enough[:6]
    assert half[6:] == enough[:2]


def test_tokens_are_reported_against_the_widths(tiny, tmp_path, capfd):
    folder = emloc.compress(
        model_name_or_path=str(tiny.base), dataset=str(tiny.data), output_dir=tmp_path / "e",
        num_calibration_samples=1,
    )  # fmt: skip
    summary = Manifest.read(folder).summary
    said = " ".join(capfd.readouterr().err.split())
    assert f"{summary['calibration_tokens']} calibration tokens, layers of up to 80 inputs" in said
    assert summary["widest_input"] == 80


def test_streaming_trains_and_calibrates(tiny, tmp_path):
    data = {"dataset": f"{tiny.data},{tiny.test}", "dataset_weights": [1, 3], "streaming": True}
    folder = emloc.compress(
        model_name_or_path=str(tiny.base),
        output_dir=tmp_path / "e",
        num_calibration_samples=8,
        **data,
    )
    assert Manifest.read(folder).summary["calibration_samples"] == 8
    train = {**tiny.train_options, **data, "max_length": 96}
    emloc.train(output_dir=tmp_path / "a", **train)
    assert Manifest.read(tmp_path / "a").summary["steps"] == 6
    with pytest.raises(ConfigError, match="streaming needs max_steps"):
        emloc.train(output_dir=tmp_path / "b", **{**train, "max_steps": -1})
    with pytest.raises(ConfigError, match="give dataset_weights, one for each"):
        emloc.train(output_dir=tmp_path / "b", **{**train, "dataset_weights": []})
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        draw_samples(
            with_plugin_options(CompressConfig)(
                model_name_or_path="m", output_dir="o", streaming=True,
                dataset=str(tmp_path / "empty.jsonl"),
            ),
            TOKENIZER,
        )  # fmt: skip


def test_packing_fills_every_row(tiny, tmp_path, monkeypatch):
    from emloc_llm import training

    seen = []
    loss = training.Trainer.compute_loss

    def spy(self, model, inputs, *rest, **named):
        seen.append(inputs["input_ids"])
        return loss(self, model, inputs, *rest, **named)

    monkeypatch.setattr(training.Trainer, "compute_loss", spy)
    emloc.train(
        output_dir=tmp_path / "a",
        **{**tiny.train_options, "packing": True, "max_length": 64, "max_steps": 2},
    )
    end = TOKENIZER.eos_token_id
    assert {ids.shape[1] for ids in seen} == {64}
    # All rows but the last of an epoch are full, of parts of several chats with two turns each.
    assert (
        sum(int(((row == end).sum() > 2) and (row != 0).all()) for ids in seen for row in ids) > 4
    )


def test_packing_loses_nothing_of_long_samples(tiny, tmp_path, monkeypatch):
    """All tokens of a document are trained, as by TRL, in rows of max_length."""
    from emloc_llm import training

    rows = []

    class Spy(training.Trainer):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            rows.extend(self.train_dataset["input_ids"])

    monkeypatch.setattr(training, "Trainer", Spy)
    texts = [letter * length for letter, length in zip("abcd", (150, 30, 200, 90))]
    data = write(tmp_path / "d.jsonl", [{"text": text} for text in texts])
    given = {**tiny.train_options, "dataset": data, "max_length": 64, "max_steps": 1}
    adapter = emloc.train(output_dir=tmp_path / "a", packing=True, **given)
    assert max(map(len, rows)) == 64
    assert "".join(
        TOKENIZER.decode([i for row in rows for i in row], skip_special_tokens=True)
    ) == "".join(texts)
    assert Manifest.read(adapter).summary["truncated_samples"] == 0


def test_streamed_rows_that_are_cut_or_teach_nothing_are_told_and_counted(tiny, tmp_path, capsys):
    """A data set of which nothing is left is refused, as it is without streaming."""
    rows = [
        {"prompt": "a" * n, "completion": c} for n, c in ((10, "yes"), (80, "no"), (58, "b" * 20))
    ]
    data = write(tmp_path / "d.jsonl", rows)
    given = {
        **tiny.train_options,
        "dataset": data,
        "max_length": 64,
        "max_steps": 1,
        "streaming": True,
    }
    adapter = emloc.train(output_dir=tmp_path / "a", **given, per_device_train_batch_size=2)
    summary = Manifest.read(adapter).summary
    assert (
        summary["read_samples"] == 2 * summary["truncated_samples"] > 0
    )  # of each pass, two and one
    said = " ".join(capsys.readouterr().err.split())
    assert "line 3 is longer than max_length=64 and is cut there, as all such samples are" in said
    assert "line 2 has no label to learn from and is left out, as all such samples are" in said
    data = write(tmp_path / "e.jsonl", rows[1:2])
    with pytest.raises(DataError, match="every label is masked"):
        emloc.train(output_dir=tmp_path / "b", **{**given, "dataset": data})
    assert not (tmp_path / "b").exists()
