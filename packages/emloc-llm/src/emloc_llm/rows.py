"""Rows of a data set with columns that we know, whatever form it comes in.

A row becomes one of three: `messages` (chat, with `tools` where there are any), `prompt` and
`completion`, or `text`. ShareGPT's `conversations` and Alpaca's `instruction`, `input`, `output` are
turned into those on the way. Several data sets are given as a list, separated by commas.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc.config import DataOptions, nearest
from emloc.errors import ConfigError, DataError

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
_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
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
    rows = _load(name, options.dataset_split if split is None else split, options.streaming)
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


def dataset_names(options: DataOptions) -> list[str]:
    """The data sets that `dataset` names."""
    return [name for name in (options.dataset or "").split(",") if name]


def shares(options: DataOptions, sizes: Sequence[int]) -> list[float]:
    """What part of the samples comes from each data set; by their sizes, if no weights are given.

    Raises:
        ConfigError: there are more or fewer weights than data sets.
    """
    weights: Sequence[float] = options.dataset_weights or sizes
    if len(weights) != len(sizes):
        raise ConfigError(
            f"dataset_weights has {len(weights)} weights for {len(sizes)} data sets; give one for each."
        )
    return [weight / sum(weights) for weight in weights]


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


def _load(name: str, split: str, streaming: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = Path(name)
    try:
        if path.is_file():
            if split not in ("train", ""):
                raise DataError(
                    f"{name} is one file and has no split {split!r}; pass the file that holds it."
                )
            if path.suffix not in _LOADERS:
                raise DataError(f"{name}: expected a file ending in {', '.join(_LOADERS)}.")
            if path.stat().st_size == 0:
                raise DataError(f"Data set {name} is empty.")
            return load_dataset(
                _LOADERS[path.suffix], data_files=name, split="train", streaming=streaming
            )
        looks_local = name.startswith((".", "/", "~")) or path.suffix in _LOADERS
        if path.exists() or not looks_local:
            return load_dataset(name, split=split, streaming=streaming)
    except DatasetGenerationError as problem:
        cause = str(problem.__cause__ or problem).splitlines()[0]
        raise DataError(f"Data set {name} cannot be parsed: {cause}") from problem
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError, ValueError) as problem:
        if isinstance(problem, DataError):
            raise
        first = str(problem).strip().splitlines()[0]
        raise DataError(f"Data set {name} cannot be loaded: {first}") from problem
    raise DataError(f"No data set {name}: there is no such file or folder.")


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
