"""Files of JSON within limits, and what is within them as Python's own reader has it."""

import json

import pytest

from emloc.artefacts.json_files import read_json, read_text
from emloc.errors import CheckpointError
from emloc.machine import bounded_json
from emloc.machine.bounded_json import parse_json


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": ' * 101 + "1" + "}" * 101, "it is nested more than 100 deep"),
        ("[" * 100_000, "it is nested more than 100 deep"),
        ('{"a": ' + "9" * 41 + "}", "it holds a number of 41 digits"),
        ('{"a": ' + "9" * 5000 + "}", "it holds a number of 5000 digits"),
        ('{"a": ["\\ud83d"]}', r"it holds half a character, '\\ud83d'"),
        ('{"\\udead": 1}', "it holds half a character"),
        ('{"a": [' + "[]," * 30 + "[]]}", "it holds more than 50 values"),
        ('{"a": 1', "cannot be read as JSON: Expecting"),
        ("[1]", "should hold a JSON object"),
    ],
)
def test_what_no_configuration_needs_is_refused(tmp_path, monkeypatch, text, says):
    if "50 values" in says:
        monkeypatch.setattr(bounded_json, "MOST_VALUES", 50)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_json(tmp_path / "config.json")
    assert str(tmp_path / "config.json") in str(caught.value)


def test_what_configurations_hold_is_read_as_it_stands(tmp_path):
    config = {
        "model_max_length": 1000000000000000019884624838656, "limit": [0.0, float("inf")], "x": None,
        "emoji": "\U0001f600", "deep": json.loads("[" * 99 + "]" * 99), "text": '"[{"' * 200,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(
        json.dumps(config)
    )  # an escape for each half of the emoji
    assert read_json(tmp_path / "config.json") == config


def test_rows_keep_their_long_numbers_and_halves():
    assert parse_json('{"a": ' + "9" * 300 + ', "b": "\\ud83d"}') == {
        "a": int("9" * 300),
        "b": "\ud83d",
    }


def test_files_that_are_too_large_or_no_text_are_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(bounded_json.MOST_BYTES + 1)
    with pytest.raises(CheckpointError, match="is 128 MiB, larger than any file of its kind"):
        read_json(tmp_path / "config.json")
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ caf\xe9 }}")
    with pytest.raises(CheckpointError, match=r"is not UTF-8 \(byte 6\)"):
        read_text(tmp_path / "chat_template.jinja")
