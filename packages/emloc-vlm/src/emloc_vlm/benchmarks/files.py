"""Tables in CSV, JSON, JSONL and parquet as records that know where they stand.

A cell is read as it stands in the file: JSON's numbers keep their digits, and what a table has turned on
the way, such as an answer `1` into `1.0` because another row had none, is refused.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

from emloc.errors import DataError
from emloc.machine.bounded_json import parse_json
from emloc_vlm.images import Source, image_source

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
            DataError: it is missing, empty, a number that a table has turned, or something else.
        """
        value = self.cells.get(column)
        if value is None:
            raise self.wrong(f"{column} is missing")
        text = self.as_text(value, column)
        if not text:
            raise self.wrong(f"{column} is empty")
        return text

    def as_text(self, value: Any, what: str) -> str:
        """A text without space around it, or a number with the digits that it has in the file.

        Raises:
            DataError: it is neither, or a number that was another once.
        """
        if isinstance(value, str):
            return value.strip()
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, Decimal) and value.is_finite() and value != value.to_integral_value():
            return str(value)
        if isinstance(value, Decimal | float) and value == value:
            raise self.wrong(
                f"{what} is the number {value}, which may have been a text such as {value:g}"
            )
        raise self.wrong(f"{what} is not text")

    def whole_number(self, column: str) -> str:
        """A cell that has to hold a whole number, which tables turn into 2.0 where some row has none.

        Raises:
            DataError: it is missing, empty or something else.
        """
        value = self.cells.get(column)
        if isinstance(value, Decimal | float) and float(value).is_integer():
            return str(int(value))
        return self.text(column).removesuffix(".0")

    def has(self, column: str) -> bool:
        """Return whether the cell holds anything."""
        value = self.cells.get(column)
        if isinstance(value, str):
            return bool(value.strip())
        return value is not None and value == value  # NaN is a cell that a table has filled

    def image(self, value: Any, *folders: str) -> Source | str:
        """The image that a cell names; a name becomes the absolute path in the first of the folders that
        has it, else in the first.

        Whether there is an image says whoever opens it. Folders are inside the image folder.

        Raises:
            DataError: as `image_source`.
        """
        here = (self.image_folder or self.path.parent).resolve()
        where = f"{self.path}, {self.unit} {self.number}"
        source = image_source(value, here, where)
        if not isinstance(source, Path):
            return source
        names = [str(Path(folder, value)) for folder in folders]
        paths = [image_source(name, here, where) for name in names]
        return str(next((p for p in paths if isinstance(p, Path) and p.is_file()), paths[0]))

    def row(
        self, image: Source | str, question: str, answer: str | list[str], metric: str
    ) -> dict[str, Any]:
        """The part that every benchmark's row has."""
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
    """The content of a JSON file; None if the path is no such file."""
    if path.suffix != ".json" or not path.is_file():
        return None
    try:
        return _parsed(path.read_text(encoding=_ENCODING))
    except ValueError:
        return None


def _parsed(text: str | bytes) -> Any:
    if isinstance(text, bytes):
        text = text.decode(_ENCODING)
    return parse_json(text, fraction=Decimal)


def open_table(path: Path, document: Any = None) -> Table | None:
    """A file as a table, None if it is none: other readers may know it.

    Args:
        document: what `open_document` gave for the path.
    """
    if not path.is_file():
        return None
    if isinstance(document, list):
        numbered = enumerate(cast("list[Any]", document), start=1)
        records = (as_record(path, number, "row", cells) for number, cells in numbered)
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
            return Table(_names(_parsed(first)), _jsonl(path))
    except (ImportError, OSError, ValueError, csv.Error):
        return None
    return None


def _names(first: Any) -> frozenset[str]:
    return (
        frozenset(map(str, cast("dict[Any, Any]", first)))
        if isinstance(first, dict)
        else frozenset()
    )


def as_record(path: Path, number: int, unit: str, cells: Any) -> Record:
    """The row of a file.

    Raises:
        DataError: it is no object.
    """
    if not isinstance(cells, dict):
        raise Record(path, number, unit, {}).wrong("this is not an object with columns")
    return Record(path, number, unit, cast("dict[str, Any]", cells))


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                cells = _parsed(line)
            except UnicodeDecodeError as problem:
                raise Record(path, number, "line", {}).wrong("this is not in UTF-8") from problem
            except ValueError as problem:
                raise Record(path, number, "line", {}).wrong("this is not JSON") from problem
            yield as_record(path, number, "line", cells)


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
                    twice = [name for name, count in Counter(header).items() if count > 1]
                    if twice:
                        raise record.wrong(f"there are two columns {twice[0]!r}")
                elif cells and len(cells) != len(header):
                    raise record.wrong(
                        f"there are {len(cells)} cells for {len(header)} columns (quote cells with commas)"
                    )
                elif cells:
                    yield record
        except UnicodeDecodeError as problem:
            raise Record(path, begins, "line", {}).wrong("this is not in UTF-8") from problem
        except csv.Error as problem:
            raise Record(path, begins, "line", {}).wrong(
                f"this is not CSV ({problem})"
            ) from problem


def _parquet(path: Path) -> Table:
    from pyarrow.parquet import ParquetFile

    file: Any = ParquetFile(path)
    rows = (cells for batch in file.iter_batches() for cells in batch.to_pylist())
    records = (as_record(path, number, "row", cells) for number, cells in enumerate(rows, start=1))
    return Table(frozenset(file.schema_arrow.names), records)
