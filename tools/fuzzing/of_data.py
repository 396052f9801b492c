"""Parsers of rows: chats and texts as JSONL, JSON, CSV, parquet and Arrow; folders with cards."""

import csv
import io
import json
from types import SimpleNamespace

from emloc.integrations.transformers.data.files import read_file
from emloc.integrations.transformers.loading import load_tokenizer
from emloc.integrations.transformers.loss import IGNORED
from emloc_llm.data import encode
from emloc_llm.rows import load_rows
from fuzzing.examples import Examples
from fuzzing.parser import Parser

CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ROWS = {
    "messages": {
        "messages": [
            {"role": "user", "content": "Reverse abc."},
            {"role": "assistant", "content": [{"type": "text", "text": "cba"}]},
            {"role": "user", "content": "And ab?"},
            {"role": "assistant", "content": "ba", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
        "system": "Be brief.",
        "chat_template_kwargs": {"thinking": False},
    },
    "calls": {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Reverse abc."},
            {"from": "gpt", "value": "cba"},
            {"from": "human", "value": "1+1?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ]
    },
    "alpaca": {"instruction": "Reverse.", "input": "abc", "output": "cba", "history": [["a", "b"]]},
    "prompt": {"prompt": "Reverse abc.", "completion": " cba"},
    "turns": {
        "prompt": [{"role": "user", "content": "Reverse abc."}],
        "completion": [{"role": "assistant", "content": "cba"}],
    },
    "text": {"text": "Some text to learn."},
}
OPTIONS = {
    "dataset_split": "train", "streaming": False, "column_map": {}, "max_length": 512, "dataset_weights": [],
    "assistant_only_loss": False, "completion_only_loss": True,
}  # fmt: skip


TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parsers(examples: Examples) -> list[Parser]:
    """All of them."""
    tokenizer = load_tokenizer(examples.model("llm"))
    tokenizer.chat_template = TEMPLATE
    return [
        *(_rows(examples, tokenizer, name, row) for name, row in ROWS.items()),
        _json(examples, tokenizer), _csv(examples), _parquet(examples), _arrow(examples),
        _card(examples),
    ]  # fmt: skip


def _encoded(folder, file, tokenizer, everything=False):
    options = SimpleNamespace(**{**OPTIONS, "assistant_only_loss": everything})
    rows = load_rows(options, str(folder / file))
    return [(row, encode(row, tokenizer, options)) for row in rows]


def _learnt(tokenizer, pairs):
    for _, sample in pairs:
        assert len(sample.input_ids) == len(sample.labels) <= OPTIONS["max_length"]
        assert all(
            label in (IGNORED, token) for token, label in zip(sample.input_ids, sample.labels)
        )
        if sample.reference is not None and not sample.truncated:
            labels = [label for label in sample.labels if label != IGNORED]
            said = tokenizer.decode(labels)
            assert sample.reference.strip() in said or not sample.reference.strip().isascii(), said


def _rows(examples, tokenizer, name, row):
    def read(folder):
        return _encoded(folder, "rows.jsonl", tokenizer, everything=name == "messages")

    def means(folder, pairs):
        lines = [line for line in (folder / "rows.jsonl").read_bytes().split(b"\n") if line.strip()]
        written = [json.loads(line.decode("utf-8-sig")) for line in lines]
        assert [dict(row) for row, _ in pairs] == written or len(written) != len(pairs)
        _learnt(tokenizer, pairs)

    folder = examples.empty(f"rows {name}")
    return Parser(f"rows: {name}", folder, "rows.jsonl", "jsonl", [[row, row]], read, means, 4)


def _json(examples, tokenizer):
    seed = [ROWS["prompt"], ROWS["prompt"]]

    def read(folder):
        return _encoded(folder, "rows.json", tokenizer)

    def means(folder, pairs):
        _learnt(tokenizer, pairs)

    folder = examples.empty("rows json")
    return Parser("rows: JSON", folder, "rows.json", "json", [seed], read, means, 2)


def _csv(examples):
    seed = [["prompt", "completion"], ["Reverse abc.", "cba"], ["a, b", 'say "x"'], ["007", "1.50"]]

    def read(folder):
        return [dict(row) for row in read_file(folder / "rows.csv")]

    def means(folder, rows):
        text = (folder / "rows.csv").read_bytes().decode("utf-8-sig")
        csv.field_size_limit(2**31 - 1)
        lines = text.lstrip("\r\n")  # the header is the first line that is not blank
        expected = list(csv.DictReader(io.StringIO(lines, newline=""), strict=True))
        named = [
            {key: cell for key, cell in row.items() if key and key.strip()} for row in expected
        ]
        assert rows == named

    return Parser("rows: CSV", examples.empty("rows csv"), "rows.csv", "csv", [seed], read, means)


def _parquet(examples):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = examples.empty("rows parquet")
    rows = {"prompt": ["Reverse abc.", "b"], "completion": ["cba", "b"], "n": [[1, 2], [3]]}
    pq.write_table(pa.table(rows), folder / "rows.parquet")
    seed = (folder / "rows.parquet").read_bytes()
    return _table(folder, "rows.parquet", "rows: parquet", seed)


def _arrow(examples):
    import pyarrow as pa

    folder = examples.empty("rows arrow")
    table = pa.table({"prompt": ["Reverse abc.", "b"], "completion": ["cba", "b"]})
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return _table(folder, "rows.arrow", "rows: Arrow", buffer.getvalue())


def _table(folder, file, name, seed):
    def read(folder):
        return [dict(row) for row in read_file(folder / file)]

    def means(folder, rows):
        assert all(isinstance(key, str) for row in rows for key in row)

    return Parser(name, folder, file, "bytes", [seed], read, means, 3)


def _card(examples):
    """The card of a folder, which says which of its files are data."""
    folder = examples.empty("card")
    (folder / "train.jsonl").write_text(json.dumps(ROWS["prompt"]) + "\n")
    (folder / "other.jsonl").write_text(json.dumps(ROWS["text"]) + "\n")
    card = {
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": "train.jsonl"}]}
        ]
    }

    def read(folder):
        options = SimpleNamespace(**OPTIONS)
        return [dict(row) for row in load_rows(options, str(folder))]

    def means(folder, rows):
        allowed = [ROWS["prompt"], ROWS["text"]]
        assert rows
        assert all(row in allowed for row in rows)

    return Parser("data card", folder, "README.md", "markdown", [card], read, means, 60)
