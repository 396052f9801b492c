"""YAML keeps what was typed: compared with what PyYAML's own loader makes of the same text."""

import datetime

import pytest
import yaml

from emloc.config import EvaluateConfig, TrainConfig, build
from emloc.errors import ConfigError
from emloc.integrations.transformers.text_options import (
    EvaluationDataOptions,
    RowOptions,
    SplitOptions,
)
from emloc.options.text import from_command_line, from_file
from emloc.options.yaml_file import load_bounded, parse_value, plain_value, read_yaml, text_of


def read(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode(encoding))
    return read_yaml(path)


SURPRISES = ["no", "on", "2024-01-05", "010", "1:30", "1_000", "1e-3", "0x10", "1.50", "007", ".5"]


@pytest.mark.parametrize("text", SURPRISES)
def test_a_value_that_is_no_plain_number_stays_as_it_was_typed(tmp_path, text):
    assert read(tmp_path, f"key: {text}\n") == {"key": text}
    assert parse_value(text) == text


def test_the_surprises_are_yamls_own():
    made = [yaml.safe_load(text) for text in SURPRISES]
    assert made[:5] == [False, True, datetime.date(2024, 1, 5), 8, 90]


@pytest.mark.parametrize("text", ["3", "-3", "0", "0.25", "1e-05", "true", "false", "1e+16"])
def test_numbers_and_booleans_can_be_had_back(text):
    value = plain_value(text)
    assert not isinstance(value, str)
    assert value == yaml.safe_load(text) or isinstance(yaml.safe_load(text), str)
    assert text_of(value) == text


def test_null_quotes_lists_and_merged_mappings_as_in_yaml(tmp_path):
    text = """
base: &base {lora_r: 2, seed: 1}
train: {<<: *base, seed: 3, prompt: "no", other: 'null', none: null, tilde: ~, empty: , list: [a, 2, 0.5]}
"""
    assert read(tmp_path, text) == yaml.safe_load(text)
    assert read(tmp_path, "\ufeffa: 1\n") == {"a": 1}
    assert read(tmp_path, "2024: x\nyes: y\n") == {"2024": "x", "yes": "y"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "c.yaml is empty"),
        ("- a\n", "is not a mapping"),
        ("a: 1\nb: {c: 1,\n  c: 2}\n", "line 3: the key c occurs twice, first in line 2"),
        ("a:\n\tb: 1\n", "line 2, column 1: a tab, but only spaces may indent"),
        ("? [a]\n: 1\n", "line 1: a key should be a plain name"),
        ("a: *x\n", "undefined alias"),
        ("a: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        ("a: !!int x\n", "not valid YAML"),
        ("[" * 5000, "nested more than 50 deep"),
    ],
)
def test_what_is_no_mapping_of_names_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"not UTF-8 \(byte 3\)"):
        read(tmp_path, "a: ü\n", "latin-1")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_yaml(tmp_path)
    with pytest.raises(ConfigError, match="No file"):
        read_yaml(tmp_path / "none")
    with pytest.raises(ConfigError, match="Cannot read"):
        read_yaml(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("{a: 1}", {"a": 1}),
        ('"null"', "null"),
        ("null", None),
        ("", ""),
        ("[V] dog", "[V] dog"),
        ("a photo: of # sks", "a photo: of # sks"),
        ("*x", "*x"),
    ],
)
def test_the_value_of_an_override(text, value):
    assert parse_value(text) == value


TYPED = [
    ("lora_r", "8", 8),
    ("seed", "1e3", 1000),
    ("max_steps", "010", 10),
    ("learning_rate", "1e-3", 0.001),
    ("dataset", "2024-01-05", "2024-01-05"),
    ("dataset", "007", "007"),
    ("dataset", "12", "12"),
    ("dataset", "true", "true"),
    ("dataset_split", "no", "no"),
    ("eval_dataset", "null", None),
    ("eval_steps", "~", None),
    ("use_dora", "no", False),
    ("use_dora", "true", True),
    ("lora_target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
    ("lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
    ("lora_target_modules", "1", ["1"]),
    ("lora_layers_to_transform", "3", [3]),
    ("lora_rank_pattern", "{q_proj: 4}", {"q_proj": 4}),
    ("lora_rank_pattern", "q_proj=4, v_proj=2", {"q_proj": 4, "v_proj": 2}),
    ("column_map", "{question: 1}", {"question": "1"}),
]


class Trained(TrainConfig, SplitOptions, RowOptions, EvaluationDataOptions):
    """Options of train, with those of a family that reads rows."""


@pytest.mark.parametrize(("option", "text", "value"), TYPED)
def test_the_same_text_means_the_same_wherever_it_is_typed(tmp_path, option, text, value):
    typed = {
        "file": from_file(Trained, read(tmp_path, f"{option}: {text}\n"))
        if "=" not in text and text != "q_proj, v_proj"
        else {option: text},
        "override": from_file(Trained, {option: parse_value(text)}),
        "command line": {option: from_command_line(Trained.model_fields[option], text)},
    }
    for where, options in typed.items():
        outcome = getattr(build(Trained, {"output_dir": "o", **options}, where), option)
        assert (outcome, type(outcome)) == (value, type(value)), where


def test_an_empty_name_is_refused_and_not_taken_for_none():
    for option in ("adapter", "model_name_or_path", "dataset", "output_dir"):
        options = {"model_name_or_path": "m", "dataset": "d", option: ""}
        with pytest.raises(ConfigError, match=f"{option} = '': it is empty"):
            build(EvaluateConfig, options, "evaluate")


def test_a_name_that_no_disk_can_have_is_refused_where_it_is_given():
    long = "é" * 128
    for option in ("adapter", "model_name_or_path", "dataset", "output_dir"):
        for name in (long, f"a/{long}/b", *([f"a,{long}"] if option == "dataset" else [])):
            options = {"model_name_or_path": "m", "dataset": "d", option: name}
            with pytest.raises(ConfigError, match=f"{option}.* it has a name of 256 bytes"):
                build(EvaluateConfig, options, "evaluate")
    address = f"https://a.b/{long}"
    assert build(EvaluateConfig, {"model_name_or_path": "m", "dataset": address}, "e").dataset


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    options = {
        "model_name_or_path": "~/m",
        "dataset": "~/a,~/b",
        "output_dir": "~/o",
        "adapter": "a~b",
    }
    config = build(EvaluateConfig, options, "evaluate")
    assert config.model_name_or_path == "/home/me/m"
    assert config.dataset == "/home/me/a,/home/me/b"
    assert str(config.output_dir) == "/home/me/o"
    assert config.adapter == "a~b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &a [x, *a]\n", r"run.yaml, line 1: \*a occurs inside what it refers to"),
        ("a: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("a: " + "[" * 9000, "nested more than 50 deep"),
        ("a: [" + "x," * 10_001 + "]", "more than 10,000 values"),
        (
            "l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"l{i}: &l{i} [{','.join([f'*l{i - 1}'] * 10)}]\n" for i in range(1, 9)),
            "line 4: it holds more than 10,000 values",
        ),
        (
            "m0: &m0 {a: 1, b: 2}\n"
            + "".join(f"m{i}: &m{i} {{<<: [{','.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
            "more than 10,000 values",
        ),
    ],
)  # fmt: skip
def test_a_file_means_no_more_than_it_could_say(tmp_path, text, says):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_yaml(tmp_path / "run.yaml")


def test_aliases_and_merged_mappings_mean_what_they_say(tmp_path):
    (tmp_path / "run.yaml").write_text("a: &a {x: 1, y: [2, 3]}\nb: *a\nc: {<<: *a, x: 4}\n")
    assert read_yaml(tmp_path / "run.yaml") == {
        "a": {"x": 1, "y": [2, 3]}, "b": {"x": 1, "y": [2, 3]}, "c": {"x": 4, "y": [2, 3]},
    }  # fmt: skip


@pytest.mark.parametrize("text", ["[" * 5000, "{a: &a [*a]}", "[!!int x]", "{? [a] : b}"])
def test_what_yaml_cannot_say_is_text_in_an_override(text):
    assert parse_value(text) == text


@pytest.mark.parametrize("option", ["max_steps", "learning_rate", "lora_r"])
def test_true_is_no_number(option):
    given = from_file(TrainConfig, {"emulator": "e", "output_dir": "o", option: True})
    with pytest.raises(ConfigError, match=f"{option} = 'true': input should be a valid"):
        build(TrainConfig, given, "train")
    given = from_file(TrainConfig, {"emulator": "e", "output_dir": "o", "use_rslora": True})
    assert build(TrainConfig, given, "train").use_rslora is True


def test_other_files_may_be_longer_and_mean_the_same_by_libyaml(monkeypatch):
    """A data set's card lists what thousands of its files hold; PyYAML's own parser takes seconds for it."""
    text = "configs:\n" + "- {config_name: a, n: [1, 2.5, 'x', null, true]}\n" * 2000
    assert load_bounded(text) == yaml.safe_load(text)
    assert load_bounded("a: &a [1]\nb: *a\n") == {"a": [1], "b": [1]}
    for hostile in ("[" * 60 + "]" * 60, "[" + "x," * 100_001 + "]", "a: &a [x, *a]"):
        with pytest.raises(ConfigError):
            load_bounded(hostile)
    monkeypatch.delattr(yaml, "CSafeLoader")
    with pytest.raises(ConfigError, match="nested more than 50 deep"):
        load_bounded("[" * 60 + "]" * 60)
    assert load_bounded("a: [1, no]") == {"a": [1, False]}
