"""From rows of data sets to token ids and labels, the same for calibration, training and scoring.

Chats go through the tokenizer's chat template (`emloc_llm.chat`). A plain prompt and completion are
concatenated and ended by the end-of-sequence token, as TRL does. Labels are -100 where there is no
loss: on prompts, unless asked otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emloc.config import CalibrationOptions, DataOptions
from emloc.errors import DataError
from emloc.integrations.transformers.loss import IGNORED
from emloc.integrations.transformers.tables import dataset_names, mix, shares
from emloc.progress import console
from emloc_llm.chat import Piece, chat_pieces
from emloc_llm.rows import alpaca_question, as_chat, load_rows


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


def encode(row: Mapping[str, Any], tokenizer: Any, options: DataOptions) -> Sample:
    """Token ids and labels of one row.

    Raises:
        DataError: the row is malformed.
    """
    chats = getattr(tokenizer, "chat_template", None) is not None
    if chats or row.get("conversations"):
        row = as_chat(row)
    if row.get("messages"):
        pieces = chat_pieces(row["messages"], row.get("tools"), tokenizer, options)
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        turns = [*row["prompt"], *row["completion"]]
        pieces = chat_pieces(turns, row.get("tools"), tokenizer, options)
    else:
        pieces = _text_pieces(row, tokenizer)
    ids = [token for piece in pieces for token in piece.ids]
    everywhere = not (options.completion_only_loss or options.assistant_only_loss)
    learnt = [piece.answer or everywhere for piece in pieces]
    labels = [
        token if learn else IGNORED for piece, learn in zip(pieces, learnt) for token in piece.ids
    ]
    plain = len(pieces) == 1
    last = 0 if plain else len(pieces[-1].ids)
    limit = options.max_length
    return Sample(
        ids[:limit],
        labels[:limit],
        0 if plain else len(ids) - last,
        pieces[-1].text,
        len(ids) > limit,
    )


def _text_pieces(row: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None and row.get("instruction") is not None:  # Alpaca, for a model without chats
        prompt = alpaca_question(row) + "\n\n"
        completion = row.get("output")
    if prompt is not None and completion is not None:
        answer = tokenizer(str(completion), add_special_tokens=False)["input_ids"]
        return [
            Piece(tokenizer(str(prompt))["input_ids"], False, None),
            Piece(answer + _end(tokenizer), True, str(completion)),
        ]
    if row.get("text") is not None:
        return [Piece(tokenizer(str(row["text"]))["input_ids"] + _end(tokenizer), True, None)]
    raise DataError(f"A row has neither messages, nor prompt and completion, nor text: {row}.")


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def encode_all(rows: Any, tokenizer: Any, options: DataOptions, name: str) -> list[Sample]:
    """Encode all rows.

    Raises:
        DataError: in no row is there anything to learn from.
    """
    samples = [encode(row, tokenizer, options) for row in rows]
    _require_labels(samples, options, name)
    return samples


def _require_labels(samples: Sequence[Sample], options: DataOptions, name: str) -> None:
    if all(label == IGNORED for sample in samples for label in sample.labels):
        raise DataError(
            f"Data set {name}: every label is masked, there is nothing to learn from; prompts fill "
            f"max_length={options.max_length}, or completions are empty. Raise max_length."
        )


def load_samples(options: DataOptions, tokenizer: Any, seed: int) -> list[Sample]:
    """All samples of all data sets; by weights, where given, the smaller sets repeated as needed."""
    names = dataset_names(options) or [""]
    parts = [encode_all(load_rows(options, name), tokenizer, options, name) for name in names]
    for name, part in zip(names, parts):
        say_truncated(part, options, f"samples of {name}")
    if len(parts) == 1:
        return parts[0]
    wanted = shares(options, [len(part) for part in parts])
    mixed = mix(parts, wanted, seed)
    counts = ", ".join(f"{round(len(mixed) * s)} of {n}" for s, n in zip(wanted, names))
    console.print(f"{len(mixed)} samples: {counts}")
    return mixed


def draw_samples(options: CalibrationOptions, tokenizer: Any) -> list[Sample]:
    """Calibration samples, drawn by seed from each data set according to its share.

    As many as `num_calibration_samples`, or until there are `num_calibration_tokens`.
    """
    names = dataset_names(options) or [""]
    tables = [load_rows(options, name) for name in names]
    if options.streaming:
        tables = [table.shuffle(seed=options.seed, buffer_size=1000) for table in tables]
        sizes = [1] * len(tables)
    else:
        tables = [table.shuffle(seed=options.seed) for table in tables]
        sizes = [len(table) for table in tables]
    drawn: list[Sample] = []
    for name, table, share in zip(names, tables, shares(options, sizes)):
        part = _draw(table, tokenizer, options, share)
        _require_labels(part, options, name)
        say_truncated(part, options, f"calibration samples of {name}")
        drawn += part
    return [sample for sample in drawn if sample.input_ids]


def _draw(table: Any, tokenizer: Any, options: CalibrationOptions, share: float) -> list[Sample]:
    rows = round(options.num_calibration_samples * share)
    tokens = options.num_calibration_tokens
    part: list[Sample] = []
    count = 0
    for row in table:
        if (len(part) >= max(rows, 1)) if tokens is None else (count >= tokens * share):
            break
        part.append(encode(row, tokenizer, options))
        count += len(part[-1].input_ids)
    return part


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
