"""Rows of visual data sets in the forms that people have, as one: a chat with images.

- InternVL's meta file: a JSON object of `{"root", "annotation", "repeat_time"}` per data set, whose
  annotations are JSONL with `image` and `conversations` (`<image>` marks where an image goes).
- Chats of transformers: `messages` whose content is text or a list of `{"type": "image"}` and
  `{"type": "text"}` entries; images inside the entries, or in a column `images`.
- Tables with `image`, `question`, `answer`; and the public files of benchmarks (`benchmarks`).

Local JSON, JSONL and CSV files are read line by line, so that a fault names its line; parquet files,
folders and hub ids through the datasets library.
"""

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from emloc.config import CalibrationOptions, DataOptions
from emloc.errors import ConfigError, DataError
from emloc.integrations.transformers.tables import dataset_names, load_table, shares
from emloc.progress import console
from emloc_vlm.benchmarks import read_benchmark
from emloc_vlm.images import ImageRef
from emloc_vlm_options import ImageOptions

PLACEHOLDER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "system": "system"}  # fmt: skip
COLUMNS = ("messages", "images", "image", "question", "answer", "conversations", "options", "kind")


class VisualOptions(DataOptions, ImageOptions):
    """The data options of this family's stages, for annotations."""


class CalibrationVisualOptions(CalibrationOptions, ImageOptions):
    """The options of stages that calibrate, for annotations."""


@dataclass(frozen=True)
class Example:
    """One chat with images.

    Attributes:
        messages: turns whose content is a list of `{"type": "image"}` and `{"type": "text", "text"}`.
        images: in the order of their entries.
        references: accepted answers of the last turn; the turn itself holds the first.
        options: letters to texts, where the question is one of multiple choice.
        kind: what the benchmark sorts by, such as closed and open.
        metric: how the benchmark scores it.
        where: file and line.
    """

    messages: Sequence[Mapping[str, Any]]
    images: tuple[ImageRef, ...]
    references: tuple[str, ...]
    options: Mapping[str, str]
    kind: str | None
    metric: str | None
    where: str


def load_examples(
    options: "VisualOptions | CalibrationVisualOptions", name: str, split: str | None = None
) -> list[Example]:
    """All rows of one data set.

    Raises:
        DataError: it cannot be read, is empty, has no columns that we know, or a row is malformed.
    """
    split = options.dataset_split if split is None else split
    examples: list[Example] = []
    for row, where, folder in _raw_rows(options, name, split):
        mapped = {options.column_map.get(key, key): value for key, value in row.items()}
        examples.append(_example(mapped, where, options.image_folder or folder))
    if not examples:
        raise DataError(f"Data set {name} is empty.")
    return examples


def mixed_examples(options: VisualOptions, seed: int) -> list[Example]:
    """The rows of all data sets; by weights, where given, the smaller sets repeated as needed."""
    names = dataset_names(options)
    if not names:
        raise DataError(
            "dataset is required: a JSON, JSONL, CSV or parquet file, a folder, or a hub id."
        )
    parts = [load_examples(options, name) for name in names]
    if len(parts) == 1:
        return parts[0]
    sizes = [len(part) for part in parts]
    wanted = shares(options, sizes)
    total = max(size / share for size, share in zip(sizes, wanted) if share > 0)
    draw = random.Random(seed)
    mixed: list[Example] = []
    for part, share in zip(parts, wanted):
        count = round(total * share)
        mixed += part * (count // len(part)) + draw.sample(part, count % len(part))
    draw.shuffle(mixed)
    return mixed


def readable(examples: Sequence[Example], options: ImageOptions) -> list[Example]:
    """The examples whose images can be read; says how many were skipped.

    Raises:
        DataError: one cannot, and `on_bad_image` is `stop`; or none can.
    """
    good: list[Example] = []
    first: str | None = None
    for example in examples:
        try:
            for image in example.images:
                image.open()
        except DataError as problem:
            if options.on_bad_image == "stop":
                raise
            first = first or str(problem)
            continue
        good.append(example)
    if first is not None:
        console.print(
            f"{len(examples) - len(good)} of {len(examples)} samples are skipped for their images; the "
            f"first: {first}"
        )
    return good


def _raw_rows(
    options: "VisualOptions | CalibrationVisualOptions", name: str, split: str
) -> Iterator[tuple[Mapping[str, Any], str, Path]]:
    """Row, file and line, and the folder in which its image paths begin."""
    path = Path(name)
    if path.is_file() and split not in ("train", ""):
        raise DataError(
            f"{name} is one file and has no split {split!r}; pass the file that holds it."
        )
    if path.is_file() and not options.column_map:
        found = read_benchmark(path, options.image_folder)
        if found is not None:
            for row in found:
                yield row, f"{path}, line {row['line']}", path.parent
            return
    if path.is_file() and path.suffix in (".json", ".jsonl", ".csv"):
        yield from _local_rows(path)
        return
    for index, row in enumerate(load_table(name, split, streaming=options.streaming)):
        yield row, f"{name}, row {index}", path if path.is_dir() else path.parent


def _local_rows(path: Path) -> Iterator[tuple[Mapping[str, Any], str, Path]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            for row in (reader := csv.DictReader(file)):
                yield row, f"{path}, line {reader.line_num}", path.parent
        return
    if path.suffix == ".jsonl":
        yield from _lines(path, path.parent)
        return
    content = _parsed(path.read_text("utf-8"), str(path))
    if isinstance(content, dict):
        entries = cast("dict[str, Any]", content)
        if all(isinstance(entry, dict) and "annotation" in entry for entry in entries.values()):
            yield from _meta(path, entries)
            return
    if not isinstance(content, list):
        raise DataError(
            f"{path} should hold a list of rows, or an object of data sets with root and annotation."
        )
    for index, row in enumerate(cast("list[Any]", content)):
        yield _mapping(row, f"{path}, entry {index}"), f"{path}, entry {index}", path.parent


def _lines(path: Path, folder: Path) -> Iterator[tuple[Mapping[str, Any], str, Path]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _mapping(_parsed(line, where), where), where, folder


def _meta(path: Path, entries: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Path]]:
    """InternVL's meta file; a repeat_time below 1 takes that share of the rows, by a fixed seed."""
    for name, entry in entries.items():
        annotation = _beside(path, str(entry["annotation"]))
        if not annotation.is_file():
            raise DataError(
                f"{path}: {name} names the annotation {annotation}, which does not exist."
            )
        rows = list(_lines(annotation, _beside(path, str(entry.get("root", "")))))
        times = float(entry.get("repeat_time", 1))
        whole, part = int(times), times - int(times)
        yield from rows * whole
        yield from random.Random(0).sample(rows, round(part * len(rows)))


def _beside(path: Path, name: str) -> Path:
    """A path that a meta file names: as it is from the working folder, or from the file's."""
    return Path(name) if Path(name).is_absolute() or Path(name).exists() else path.parent / name


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as problem:
        raise DataError(f"{where} is not JSON: {problem}.") from problem


def _mapping(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} should be an object with columns.")
    return cast("dict[str, Any]", row)


def _example(row: Mapping[str, Any], where: str, folder: Path) -> Example:
    if row.get("messages"):
        turns, inside = _from_messages(row["messages"], where)
    elif row.get("conversations"):
        turns, inside = _from_conversations(row["conversations"], where), []
    elif row.get("question") is not None and row.get("answer") is not None:
        turns, inside = _from_table(row), []
    else:
        raise DataError(
            f"{where} has the columns {', '.join(sorted(map(str, row)))}; needed are messages, "
            f"conversations, or image, question and answer. Name yours with column_map, for example "
            f"query=question."
        )
    given = _listed(row.get("images")) or _listed(row.get("image"))
    sources = [found if found is not None else given.pop(0) for found in inside if found or given]
    sources += given
    turns = _with_entries(turns, len(sources), where)
    if turns[-1]["role"] != "assistant":
        raise DataError(f"{where}: the chat must end with the assistant's turn.")
    answer = row.get("answer")
    references = [str(a) for a in _listed(answer)] or [_text(turns[-1])]
    return Example(
        turns,
        tuple(ImageRef(_source(source, folder, where), where) for source in sources),
        tuple(references),
        row.get("options") or {},
        row.get("kind"),
        row.get("metric"),
        where,
    )


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(cast("list[Any]", value)) if isinstance(value, (list, tuple)) else [value]


def _source(source: Any, folder: Path, where: str) -> Any:
    """A path, bytes or PIL image out of what a column holds."""
    if isinstance(source, Mapping):
        entry = cast("Mapping[str, Any]", source)
        source = entry.get("bytes") or entry.get("path")
    if isinstance(source, (str, Path)):
        if str(source).startswith(("http://", "https://")):
            raise DataError(f"{where}: the image {source} is an address; download it first.")
        return folder / source
    if source is None:
        raise DataError(f"{where}: an image entry names no image.")
    return source


def _from_table(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    question = str(row["question"])
    options = cast("Mapping[str, str]", row.get("options") or {})
    question += "".join(f"\n{letter}. {text}" for letter, text in options.items())
    answer = str(_listed(row["answer"])[0]) if _listed(row["answer"]) else ""
    return [_turn("user", question), _turn("assistant", answer)]


def _from_conversations(turns: Any, where: str) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = []
    for turn in turns:
        speaker = str(turn.get("from") or turn.get("role"))
        if speaker not in _ROLES:
            raise DataError(f"{where}: a turn from {speaker!r}; known are {', '.join(_ROLES)}.")
        value = turn.get("value", turn.get("content"))
        chat.append(_turn(_ROLES[speaker], str(value)))
    return chat


def _from_messages(turns: Any, where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """The turns with image entries left empty, and what those entries held (None: nothing)."""
    chat: list[dict[str, Any]] = []
    inside: list[Any] = []
    for turn in turns:
        content = turn.get("content")
        if isinstance(content, str):
            chat.append(_turn(str(turn["role"]), content))
            continue
        parts: list[dict[str, Any]] = []
        for part in content or []:
            if part.get("type") == "image":
                inside.append(
                    next((part[k] for k in ("image", "path", "url") if part.get(k)), None)
                )
                parts.append({"type": "image"})
            elif part.get("type") == "text":
                parts.append({"type": "text", "text": str(part["text"])})
            else:
                raise DataError(
                    f"{where}: a content entry of type {part.get('type')!r}; known are image and text."
                )
        chat.append({"role": str(turn["role"]), "content": parts})
    return chat, inside


def _turn(role: str, text: str) -> dict[str, Any]:
    """A turn whose `<image>` marks have become entries."""
    parts: list[dict[str, Any]] = []
    for index, piece in enumerate(text.split(PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        # InternVL writes the mark on a line of its own; templates set images off themselves.
        piece = piece.strip("\n") if PLACEHOLDER in text else piece
        if piece:
            parts.append({"type": "text", "text": piece})
    return {"role": role, "content": parts or [{"type": "text", "text": ""}]}


def _with_entries(turns: list[dict[str, Any]], images: int, where: str) -> list[dict[str, Any]]:
    """As many image entries as images: without any marks, images come before the first question."""
    marks = sum(part["type"] == "image" for turn in turns for part in turn["content"])
    if marks == images:
        return turns
    if marks:
        raise DataError(f"{where}: {marks} places for images and {images} images.")
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = [{"type": "image"}] * images + turn["content"]
            return turns
    raise DataError(f"{where}: there are images and no turn of the user.")


def _text(turn: Mapping[str, Any]) -> str:
    return "".join(part["text"] for part in turn["content"] if part["type"] == "text")


def check_columns(mapping: Mapping[str, str]) -> None:
    """Refuse a column map to a name that is none of ours."""
    for theirs, ours in mapping.items():
        if ours not in COLUMNS:
            raise ConfigError(f"column_map maps {theirs} to {ours}, none of {', '.join(COLUMNS)}.")
