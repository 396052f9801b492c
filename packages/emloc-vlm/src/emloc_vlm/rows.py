"""Rows of visual data sets in the forms that people have, as one: a chat with images.

- InternVL's meta file: a JSON object of `{"root", "annotation", "repeat_time"}` per data set, whose
  annotations are JSONL with `image` and `conversations` (`<image>` marks where an image goes).
- Chats of transformers: `messages` whose content is text or a list of `{"type": "image"}` and
  `{"type": "text"}` entries; images inside the entries, or in a column `images`.
- Tables with `image`, `question`, `answer`; and the public files of benchmarks (`benchmarks`).
- ShareGPT, Alpaca and turns as prompt and completion, as language models read them, with a column `image`
  or `images`.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from emloc.artefacts.named_files import named_path
from emloc.errors import DataError
from emloc.integrations.transformers.data.files import (
    data_suffix,
    open_data,
    parsed_json,
    read_open,
)
from emloc.integrations.transformers.data.folders import ADDRESS
from emloc.integrations.transformers.data.rows import Row, Rows
from emloc.integrations.transformers.tables import (
    dataset_names,
    load_known,
    mix,
    require_whole_file,
    shares,
)
from emloc.machine.progress import console
from emloc.machine.special_files import refuse_special
from emloc_vlm.benchmarks import of_split, read_benchmark
from emloc_vlm.examples import IMAGE_COLUMNS, REFERENCES, VISUAL_FORMS, Example, example_of
from emloc_vlm_options import ImageOptions

META_KEYS = ("root", "annotation", "repeat_time", "length")
"""Keys of an entry of a meta file that are read, and how many rows it has, which is counted."""

TILES = "max_dynamic_patch"

MOST_ROWS = 20_000_000
"""Rows of an entry of a meta file with its repetitions."""


def load_examples(options: Any, name: str, split: str | None = None) -> list[Example]:
    """All rows of one data set.

    Raises:
        DataError: it cannot be read, is empty, has no columns that we know, or a row is malformed.
    """
    split = str(options.dataset_split) if split is None else split
    image_folder = options.image_folder
    benchmark = _benchmark_rows(options, name, split)
    if benchmark is not None:
        return [
            example_of(row, row.where, image_folder or row.folder, row["metric"])
            for row in benchmark
        ]
    others = (*IMAGE_COLUMNS, REFERENCES)
    meta = _meta_rows(options, name, split)
    rows = load_known(options, name, split, VISUAL_FORMS, others, meta)
    return [example_of(row, row.where, image_folder or row.folder) for row in rows]


def mixed_examples(options: Any, seed: int) -> list[Example]:
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
            f"{len(examples) - len(good)} of {len(examples)} samples are skipped because of their images; "
            f"the first: {first}",
            markup=False,
        )
    return good


def _benchmark_rows(options: Any, name: str, split: str) -> Iterable[Row] | None:
    """The rows of a benchmark's file; None of any other."""
    path = Path(name)
    refuse_special(path, DataError)
    if not path.is_file() or options.column_map:
        return None
    benchmark = read_benchmark(path, options.image_folder)
    if benchmark is None:
        return None
    if any("split" in row for row in benchmark):
        benchmark = of_split(path, benchmark, split)
    else:
        require_whole_file(name, split)
    return [Row(row, f"{path}, line {row['line']}", path.parent) for row in benchmark]


def _meta_rows(options: Any, name: str, split: str) -> Callable[[], Rows] | None:
    """A reader of the rows of InternVL's meta file; None for any other."""
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        return None
    content = parsed_json(path)
    entries = cast("dict[str, Any]", content) if isinstance(content, dict) else {}
    if not entries or not all(isinstance(e, dict) and "annotation" in e for e in entries.values()):
        return None
    require_whole_file(name, split)
    folders = [Path(), path.parent, *([options.image_folder] if options.image_folder else [])]

    def read() -> Rows:
        rows = Rows(
            row
            for entry in entries.items()
            for row in _annotated(path, *entry, folders, options.max_dynamic_patch)
        )
        if not rows:
            raise DataError(f"Data set {name} is empty.")
        return rows

    return read


def _say_unused(entry: Mapping[str, Any], where: str, largest: int | None) -> None:
    """Say which keys of an entry change nothing here."""
    rest = {key: value for key, value in entry.items() if key not in META_KEYS and value}
    if rest.get(TILES) == largest:
        rest.pop(TILES, None)
    if rest:
        shown = ", ".join(f"{key}={value!r}" for key, value in rest.items())
        console.print(
            f"{where} also has {shown}, which is not used"
            + (f"; {TILES} is one option for all data sets" if TILES in rest else ""),
            markup=False,
        )


def _annotated(
    path: Path, name: str, entry: Mapping[str, Any], folders: Sequence[Path], largest: int | None
) -> Iterator[Row]:
    """The rows of one entry; a repeat_time below 1 takes that share of them, by a fixed seed."""
    where = f"{path}: {name}"
    annotation = _named(entry["annotation"], where, "annotation", folders)
    if not annotation.is_file():
        raise DataError(f"{where} names the annotation {annotation}, which is not a file.")
    root = entry.get("root") or None
    folder = path.parent if root is None else _named(root, where, "root", folders)
    with open_data(annotation) as file:
        known = data_suffix(annotation.name) or ".jsonl"
        rows = list(read_open(file, known, str(annotation), folder))
    times = entry.get("repeat_time", 1)
    if isinstance(times, bool) or not isinstance(times, (int, float)) or not 0 <= times < 10**6:
        raise DataError(f"{where} has repeat_time {times!r}, which is not a valid count.")
    if times * len(rows) > MOST_ROWS:
        raise DataError(
            f"{where} repeats {len(rows)} rows {times} times, which makes more than {MOST_ROWS:,}; lower "
            f"repeat_time."
        )
    whole, part = int(times), times - int(times)
    _say_unused(entry, where, largest)
    yield from rows * whole
    yield from random.Random(0).sample(rows, round(part * len(rows)))


def _named(name: Any, where: str, what: str, folders: Sequence[Path]) -> Path:
    """The path that a meta file names: in the working folder, beside the file, or in the image folder."""
    if not isinstance(name, str) or ADDRESS.search(name):
        raise DataError(
            f"{where} names the {what} {name!r}, which is not the path of a local file."
        )
    refused: DataError | None = None
    for folder in folders:
        try:
            path = named_path(folder, name, where, DataError)
        except DataError as problem:
            refused = refused or problem
            continue
        if path.exists():
            return path
    if refused is not None:
        raise refused
    raise DataError(f"{where} names the {what} {folders[1] / name}, which does not exist.")
