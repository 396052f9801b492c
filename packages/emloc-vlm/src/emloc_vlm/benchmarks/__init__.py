"""Benchmarks of visual question answering as they are published, one file per format.

A row of any of them becomes

    {"image": absolute path, "question": text, "answer": text or list of accepted texts,
     "options": {key: text}, "kind": "closed" or "open" or ..., "line": number, "metric": name}

with `options` and `kind` only where the format has them, and `metric` one of `scoring.METRICS`. `line`
is the line in the file, or the number of the row where a file has no lines.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from emloc_vlm.benchmarks import pmc_vqa, vqa_rad, vqa_v2, websrc, worldcuisines
from emloc_vlm.benchmarks.files import open_document, open_table

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
        return list(vqa_v2.rows(path, document, image_folder))
    table = open_table(path, document)
    if table is not None:
        for reader in _TABLES:
            if reader.recognises(table.columns):
                records = (replace(record, image_folder=image_folder) for record in table.records)
                return list(reader.rows(records))
    return None
