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
from pathlib import Path
from typing import Any, cast

from emloc.config import CalibrationOptions, DataOptions
from emloc.errors import ConfigError, DataError
from emloc.integrations.transformers.tables import dataset_names, load_table, mix, shares
from emloc.progress import console
from emloc_vlm.benchmarks import of_split, read_benchmark
from emloc_vlm.examples import Example, example_of
from emloc_vlm_options import ImageOptions

COLUMNS = ("messages", "images", "image", "question", "answer", "conversations", "options", "kind")


class VisualOptions(DataOptions, ImageOptions):
    """The data options of this family's stages, for annotations."""


class CalibrationVisualOptions(CalibrationOptions, ImageOptions):
    """The options of stages that calibrate, for annotations."""


def load_examples(
    options: "VisualOptions | CalibrationVisualOptions", name: str, split: str | None = None
) -> list[Example]:
    """All rows of one data set.

    Raises:
        DataError: it cannot be read, is empty, has no columns that we know, or a row is malformed.
    """
    _check_columns(options.column_map)
    split = options.dataset_split if split is None else split
    examples: list[Example] = []
    for row, where, folder in _raw_rows(options, name, split):
        mapped = {options.column_map.get(key, key): value for key, value in row.items()}
        examples.append(example_of(mapped, where, options.image_folder or folder))
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
    return mix(parts, shares(options, [len(part) for part in parts]), seed)


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
    found = None
    if path.is_file() and not options.column_map:
        found = read_benchmark(path, options.image_folder)
    if found is not None and any("split" in row for row in found):
        found = of_split(path, found, split)
    elif path.is_file() and split not in ("train", ""):
        raise DataError(
            f"{name} is one file and has no split {split!r}; pass the file that holds it."
        )
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


def _check_columns(mapping: Mapping[str, str]) -> None:
    """Refuse a column map to a name that is none of ours."""
    for theirs, ours in mapping.items():
        if ours not in COLUMNS:
            raise ConfigError(f"column_map maps {theirs} to {ours}, none of {', '.join(COLUMNS)}.")
