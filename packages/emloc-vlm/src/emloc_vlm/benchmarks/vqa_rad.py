"""VQA-RAD (Lau et al. 2018): questions on radiological images, closed or open.

The official file is a JSON list with `image_name`, its images in `VQA_RAD Image Folder/`, and training
and test questions together, told apart by `phrase_type`; rows then have `split`. Tables with `image`
are read too.
"""

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from emloc_vlm.benchmarks.files import Record

NAME = "VQA-RAD"
KINDS = ("closed", "open")


def recognises(columns: Set[str]) -> bool:
    """Return whether these are VQA-RAD's columns."""
    return columns >= {"question", "answer", "answer_type"} and bool(
        columns & {"image", "image_name"}
    )


def fits(cells: Mapping[str, Any]) -> bool:
    """Return whether the first row is one, as `answer_type` is a name that others use too."""
    return str(cells.get("answer_type")).strip().lower() in KINDS


def rows(records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """The rows, with `kind` "closed" or "open", and `split` "train" or "test" if the file has both.

    Raises:
        DataError: a cell is missing, or `answer_type` is neither OPEN nor CLOSED.
    """
    for record in records:
        if "image_name" in record.cells:
            image = record.image(record.text("image_name"), "VQA_RAD Image Folder", "images", "")
        else:
            image = record.image(record.cells.get("image"), "", "images")
        kind = record.text("answer_type").lower()
        if kind not in KINDS:
            raise record.wrong(f"answer_type is {kind!r}, neither OPEN nor CLOSED")
        row = record.row(image, record.text("question"), record.text("answer"), "vqa_rad")
        row["kind"] = kind
        if "phrase_type" in record.cells:
            row["split"] = "test" if record.text("phrase_type").startswith("test") else "train"
        yield row
