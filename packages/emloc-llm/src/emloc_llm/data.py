"""From rows of a data set to token ids and labels, the same for calibration, training and scoring.

A row is `messages` (chat), `prompt` and `completion` (texts, or lists of messages), or `text`. Chats
go through the tokenizer's chat template; the last assistant turn is the completion. A plain prompt and
completion are concatenated and ended by the end-of-sequence token, as TRL does. Labels are -100 where
there is no loss: on prompts, unless asked otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.config import DataOptions, nearest
from emloc.errors import ConfigError, DataError
from emloc.progress import console

IGNORED = -100
COLUMNS = ("messages", "prompt", "completion", "text")
_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Sample:
    """One encoded example.

    Attributes:
        input_ids: prompt and completion.
        labels: same length, -100 where there is no loss.
        prompt_length: tokens before the completion; 0 for plain text.
        reference: the completion as text; None for plain text.
        truncated: whether max_length cut it.
    """

    input_ids: list[int]
    labels: list[int]
    prompt_length: int
    reference: str | None
    truncated: bool


def load_rows(options: DataOptions, dataset: str | None = None, split: str | None = None) -> Any:
    """The data set with our column names, as a `datasets.Dataset`.

    Args:
        dataset, split: instead of those that the options name.

    Raises:
        DataError: it cannot be read, is empty, or has no columns that we know.
    """
    name = dataset or options.dataset
    if not name:
        raise DataError("dataset is required: a JSONL, CSV or parquet file, a folder, or a hub id.")
    rows = _load(name, options.dataset_split if split is None else split)
    if len(rows) == 0:
        raise DataError(f"Data set {name} is empty.")
    mapping = _column_map(options.column_map, rows.column_names, name)
    # A column of ours that another one is mapped to gives way to it.
    rows = rows.remove_columns(
        sorted(set(mapping.values()) & set(rows.column_names) - set(mapping))
    )
    rows = rows.rename_columns(mapping)
    has = set(rows.column_names)
    if not ({"messages"} <= has or {"prompt", "completion"} <= has or {"text"} <= has):
        raise DataError(
            f"Data set {name} has the columns {', '.join(sorted(has))}; needed are messages, or "
            f"prompt and completion, or text. Name yours with column_map, for example "
            f"question=prompt,answer=completion."
        )
    return rows


def _load(name: str, split: str) -> Any:
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
            return load_dataset(_LOADERS[path.suffix], data_files=name, split="train")
        looks_local = name.startswith((".", "/", "~")) or path.suffix in _LOADERS
        if path.exists() or not looks_local:
            return load_dataset(name, split=split)
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


def encode(row: Mapping[str, Any], tokenizer: Any, options: DataOptions) -> Sample:
    """Token ids and labels of one row.

    Raises:
        DataError: the row is malformed.
    """
    if row.get("messages"):
        prompt, completion, reference = _encode_chat(row["messages"], tokenizer)
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        turns = [*row["prompt"], *row["completion"]]
        prompt, completion, reference = _encode_chat(turns, tokenizer)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        reference = str(row["completion"])
        prompt = tokenizer(str(row["prompt"]))["input_ids"]
        completion = tokenizer(reference, add_special_tokens=False)["input_ids"]
        completion = completion + _end(tokenizer)
    elif row.get("text") is not None:
        prompt, reference = [], None
        completion = tokenizer(str(row["text"]))["input_ids"] + _end(tokenizer)
    else:
        raise DataError(f"A row has neither messages, nor prompt and completion, nor text: {row}.")
    ids = prompt + completion
    silent = len(prompt) if options.completion_only_loss else 0
    labels = [IGNORED] * silent + ids[silent:]
    limit = options.max_length
    return Sample(ids[:limit], labels[:limit], len(prompt), reference, len(ids) > limit)


def _encode_chat(messages: Any, tokenizer: Any) -> tuple[list[int], list[int], str]:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(
            "The data set holds chat messages and the tokenizer has no chat template; use an instruct "
            "model, or prompt and completion columns."
        )
    if messages[-1].get("role") != "assistant":
        raise DataError(f"A chat must end with the assistant's turn: {messages}.")
    head = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(head):
        raise DataError(
            "The tokenizer's chat template renders a prompt differently once it is answered; use "
            "prompt and completion columns."
        )
    prompt = tokenizer(head, add_special_tokens=False)["input_ids"]
    completion = tokenizer(whole[len(head) :], add_special_tokens=False)["input_ids"]
    return prompt, completion, str(messages[-1]["content"])


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def encode_all(rows: Any, tokenizer: Any, options: DataOptions, name: str) -> list[Sample]:
    """Encode all rows.

    Raises:
        DataError: in no row is there anything to learn from.
    """
    samples = [encode(row, tokenizer, options) for row in rows]
    if all(label == IGNORED for sample in samples for label in sample.labels):
        raise DataError(
            f"Data set {name}: every label is masked, there is nothing to learn from; prompts fill "
            f"max_length={options.max_length}, or completions are empty. Raise max_length."
        )
    return samples


def say_truncated(samples: Sequence[Sample], options: DataOptions, what: str) -> None:
    """Tell the user how many samples max_length cut."""
    cut = sum(sample.truncated for sample in samples)
    if cut:
        console.print(
            f"{cut} of {len(samples)} {what} are longer than max_length={options.max_length} and "
            f"were truncated"
        )


def pad(samples: Sequence[Sample], pad_id: int, left: bool = False) -> dict[str, Tensor]:
    """A batch: `input_ids`, `attention_mask`, `labels`, each samples × longest, int64."""
    longest = max(len(sample.input_ids) for sample in samples)

    def fill(values: list[int], filler: int) -> list[int]:
        blank = [filler] * (longest - len(values))
        return blank + values if left else values + blank

    return {
        "input_ids": torch.tensor([fill(s.input_ids, pad_id) for s in samples]),
        "attention_mask": torch.tensor([fill([1] * len(s.input_ids), 0) for s in samples]),
        "labels": torch.tensor([fill(s.labels, IGNORED) for s in samples]),
    }


def in_batches(samples: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
