"""Tables in CSV, JSON, JSONL and parquet as records that know where they stand."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from emloc.errors import DataError

_ENCODING = "utf-8-sig"  # With or without a byte order mark.


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Attributes:
        number: the line it begins at; in files without lines, how many rows come up to it.
        unit: "line" or "row", whichever `number` counts.
        image_folder: where images are looked for, if not beside the file.
    """

    path: Path
    number: int
    unit: str
    cells: Mapping[str, Any]
    image_folder: Path | None = None

    def wrong(self, what: str) -> DataError:
        """The error that says what is wrong with this row."""
        return DataError(
            f"{self.path}, {self.unit} {self.number}: {what}; correct the {self.unit} or remove it."
        )

    def text(self, column: str) -> str:
        """A cell that has to hold a text or a number.

        Raises:
            DataError: it is missing, empty or something else.
        """
        value = self.cells.get(column)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
            raise self.wrong(f"{column} is {'missing' if value is None else 'no text'}")
        if not str(value).strip():
            raise self.wrong(f"{column} is empty")
        return str(value).strip()

    def image(self, name: str, *folders: str) -> str:
        """The absolute path of an image in the first of the folders that has it, else in the first.

        Whether there is an image says whoever opens it. Folders are inside the image folder.
        """
        here = (self.image_folder or self.path.parent).absolute()
        candidates = [here / folder / name for folder in folders]
        return str(next((path for path in candidates if path.is_file()), candidates[0]))

    def row(
        self, image: str, question: str, answer: str | list[str], metric: str
    ) -> dict[str, Any]:
        """What every benchmark's row has."""
        return {
            "image": image,
            "question": question,
            "answer": answer,
            "line": self.number,
            "metric": metric,
        }


@dataclass(frozen=True)
class Table:
    """A file's columns, and its records as they are read."""

    columns: frozenset[str]
    records: Iterable[Record]


def open_document(path: Path) -> Any:
    """What a JSON file holds, None if the path is no such file."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding=_ENCODING))
    except ValueError:
        return None


def open_table(path: Path, document: Any = None) -> Table | None:
    """A file as a table, None if it is none: other readers may know it.

    Args:
        document: what `open_document` gave for the path.
    """
    if not path.is_file():
        return None
    if isinstance(document, list):
        numbered = enumerate(cast("list[Any]", document), start=1)
        records = (_record(path, number, "row", cells) for number, cells in numbered)
        return Table(_names(document[0] if document else None), records)
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        if path.suffix == ".csv":
            with path.open(encoding=_ENCODING, newline="") as file:
                return Table(frozenset(next(csv.reader(file), [])), _csv(path))
        if path.suffix in (".jsonl", ".json"):
            with path.open("rb") as file:
                first = next((line for line in file if line.strip()), b"null")
            return Table(_names(json.loads(first)), _jsonl(path))
    except (ImportError, OSError, ValueError, csv.Error):
        return None
    return None


def _names(first: Any) -> frozenset[str]:
    return (
        frozenset(map(str, cast("dict[Any, Any]", first)))
        if isinstance(first, dict)
        else frozenset()
    )


def _record(path: Path, number: int, unit: str, cells: Any) -> Record:
    if not isinstance(cells, dict):
        raise Record(path, number, unit, {}).wrong("this is no object with columns")
    return Record(path, number, unit, cast("dict[str, Any]", cells))


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except ValueError as problem:
                raise Record(path, number, "line", {}).wrong("this is no JSON") from problem
            yield _record(path, number, "line", cells)


def _csv(path: Path) -> Iterator[Record]:
    header: list[str] = []
    begins = 1
    with path.open(encoding=_ENCODING, newline="") as file:
        reader = csv.reader(file)
        try:
            for cells in reader:
                record = Record(path, begins, "line", dict(zip(header, cells)))
                begins = reader.line_num + 1
                if not header:
                    header = cells
                elif cells and len(cells) != len(header):
                    raise record.wrong(
                        f"there are {len(cells)} cells for {len(header)} columns (quote cells with commas)"
                    )
                elif cells:
                    yield record
        except (csv.Error, UnicodeDecodeError) as problem:
            raise Record(path, begins, "line", {}).wrong(f"this is no CSV ({problem})") from problem


def _parquet(path: Path) -> Table:
    from pyarrow.parquet import ParquetFile

    file: Any = ParquetFile(path)
    rows = (cells for batch in file.iter_batches() for cells in batch.to_pylist())
    records = (_record(path, number, "row", cells) for number, cells in enumerate(rows, start=1))
    return Table(frozenset(file.schema_arrow.names), records)
