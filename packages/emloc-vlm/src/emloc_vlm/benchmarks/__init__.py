"""Benchmarks of visual question answering as they are published, one file per format.

A row of any of them becomes

    {"image": absolute path, "question": text, "answer": text or list of accepted texts,
     "options": {key: text}, "kind": "closed" or "open" or ..., "line": number, "metric": name}

with `options` and `kind` only where the format has them, and `metric` one of `scoring.METRICS`. `line`
is the line in the file, or the number of the row where a file has no lines.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from emloc.errors import DataError
from emloc.machine.progress import console
from emloc_vlm.benchmarks import pmc_vqa, vqa_rad, vqa_v2, websrc, worldcuisines
from emloc_vlm.benchmarks.files import open_document, open_table

_CHATS = {"messages", "conversations"}
_TABLES = (pmc_vqa, worldcuisines, vqa_rad, websrc)


def read_benchmark(path: Path, image_folder: Path | None = None) -> list[dict[str, Any]] | None:
    """The rows of a benchmark's file; None if the file is in none of the formats.

    PMC-VQA (CSV), WebSRC (a site's `dataset.csv`, or JSONL with `image`), WorldCuisines (JSONL, parquet
    or CSV), VQA-RAD (the official JSON, or JSONL with `image`), and VQA v2 (questions or annotations;
    the other file is found beside it). They are recognised by their columns.

    Args:
        image_folder: where the benchmark's images are, if not beside the file.

    Raises:
        DataError: a row is malformed, or a file that belongs to this one is missing.
    """
    document = open_document(path)
    if vqa_v2.recognises(document):
        _say(path, "VQA v2")
        return list(vqa_v2.rows(path, document, image_folder))
    table = open_table(path, document)
    if table is not None:
        for reader in _TABLES:
            if not reader.recognises(table.columns) or table.columns & _CHATS:
                continue
            records = [replace(record, image_folder=image_folder) for record in table.records]
            if records and reader.fits(records[0].cells):
                _say(path, reader.NAME)
                return list(reader.rows(records))
    return None


def of_split(path: Path, rows: Sequence[Mapping[str, Any]], split: str) -> list[Mapping[str, Any]]:
    """The rows of a split, where a file holds several; all rows of other files.

    Args:
        split: `train` or `test`; empty means the rows to evaluate on.

    Raises:
        DataError: the file has none of that split.
    """
    if not any("split" in row for row in rows):
        return list(rows)
    split = split or "test"
    chosen = [row for row in rows if row.get("split") == split]
    known = Counter(str(row.get("split")) for row in rows)
    held = " and ".join(f"{count} {name}" for name, count in known.items())
    if not chosen:
        raise DataError(f"{path} has no rows of split {split!r}; it holds {held} rows.")
    console.print(f"{path} holds {held} rows; those of {split} are read")
    return chosen


def files_beside(path: Path, document: Any) -> list[Path]:
    """Files without which a benchmark's file is half of one.

    Args:
        document: what `open_document` gave for the path.
    """
    return vqa_v2.files_beside(path, document) if vqa_v2.recognises(document) else []


def _say(path: Path, name: str) -> None:
    console.print(
        f"{path} is read as {name}, judging by its columns; to read a table of your own, pass column_map"
    )
