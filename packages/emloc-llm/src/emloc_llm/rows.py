"""Rows of a data set with columns that we know, whatever form it comes in.

A row becomes one of three: `messages` (chat, with `tools` where there are any), `prompt` and
`completion`, or `text`. ShareGPT's `conversations` and Alpaca's `instruction`, `input`, `output` are
turned into those on the way. Several data sets are given as a list, separated by commas.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from emloc.config import DataOptions, nearest
from emloc.errors import ConfigError, DataError
from emloc.integrations.transformers.tables import load_table

COLUMNS = (
    "messages", "prompt", "completion", "text", "tools", "conversations", "system",
    "instruction", "input", "output",
)  # fmt: skip
_FORMS = (
    {"messages"},
    {"prompt", "completion"},
    {"text"},
    {"conversations"},
    {"instruction", "output"},
)
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "chatgpt": "assistant", "bard": "assistant", "observation": "tool", "tool": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
"""ShareGPT's names of who speaks."""


def load_rows(options: DataOptions, dataset: str | None = None, split: str | None = None) -> Any:
    """One data set with our column names: a `datasets.Dataset`, or an `IterableDataset` if streamed.

    Args:
        dataset, split: instead of those that the options name.

    Raises:
        DataError: it cannot be read, is empty, or has no columns that we know.
    """
    name = dataset or options.dataset
    if not name:
        raise DataError("dataset is required: a JSONL, CSV or parquet file, a folder, or a hub id.")
    rows = load_table(name, options.dataset_split if split is None else split, options.streaming)
    columns = _columns(rows)
    if not columns:
        raise DataError(f"Data set {name} is empty.")
    mapping = _column_map(options.column_map, columns, name)
    # A column of ours that another one is mapped to gives way to it.
    rows = rows.remove_columns(sorted(set(mapping.values()) & set(columns) - set(mapping)))
    rows = rows.rename_columns(mapping)
    has = {mapping.get(column, column) for column in columns}
    if not any(form <= has for form in _FORMS):
        raise DataError(
            f"Data set {name} has the columns {', '.join(sorted(has))}; needed are messages, prompt and "
            f"completion, text, conversations, or instruction and output. Name yours with column_map, "
            f"for example question=prompt,answer=completion."
        )
    return rows


def _columns(rows: Any) -> list[str]:
    if hasattr(rows, "__len__"):
        return list(rows.column_names) if len(rows) else []
    return list(next(iter(rows), {}))


def as_chat(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """ShareGPT and Alpaca rows as `messages`; any other row as it is.

    Raises:
        DataError: a turn's speaker is unknown.
    """
    if row.get("conversations"):
        turns = [_turn(turn) for turn in row["conversations"]]
        if row.get("system"):
            turns.insert(0, {"role": "system", "content": row["system"]})
        return {"messages": turns, "tools": row.get("tools")}
    if row.get("instruction") is not None and row.get("output") is not None:
        turns = [
            {"role": "user", "content": alpaca_question(row)},
            {"role": "assistant", "content": row["output"]},
        ]
        if row.get("system"):
            turns.insert(0, {"role": "system", "content": row["system"]})
        return {"messages": turns}
    return row


def alpaca_question(row: Mapping[str, Any]) -> str:
    """Alpaca's instruction, and its input where there is one."""
    return "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    if "role" in turn:
        return dict(turn)
    speaker = str(turn.get("from"))
    if speaker not in _ROLES:
        raise DataError(
            f"A conversation has a turn from {speaker!r}; known are {', '.join(sorted(_ROLES))}."
        )
    return {"role": _ROLES[speaker], "content": turn.get("value")}


def _column_map(mapping: Mapping[str, str], columns: Sequence[str], name: str) -> dict[str, str]:
    for theirs, ours in mapping.items():
        if theirs not in columns:
            hint = nearest(theirs, list(columns))
            raise DataError(f"Data set {name} has no column {theirs} (column_map).{hint}")
        if ours not in COLUMNS:
            raise ConfigError(
                f"column_map maps {theirs} to {ours}, which is none of {', '.join(COLUMNS)}."
            )
    return dict(mapping)
