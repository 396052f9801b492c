"""Local tables, read row by row: nothing is inferred, and a fault names its line.

CSV cells are text and stay text: `00123`, `1.50`, `NA` and dates are what they look like. JSON values keep
the types that they are written with, row by row: rows need not have the same keys, and what one row has is
not made up for another. Parquet and Arrow have types of their own; pictures in them are neither decoded nor
fetched. Text may be compressed: `train.jsonl.gz` is read as `train.jsonl` is.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from emloc.artefacts.read_errors import unreadable
from emloc.errors import DataError
from emloc.integrations.transformers.data.arrow import arrow_rows, parquet_rows
from emloc.integrations.transformers.data.rows import Row
from emloc.machine.bounded_json import parse_json
from emloc.machine.special_files import refuse_special

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
}
LONGEST_CELL = 2**31 - 1
LONGEST_LINE = 256 << 20
_TABLES = {".parquet": parquet_rows, ".arrow": arrow_rows}
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one local file, by its suffix.

    Raises:
        DataError: it is of another kind, is no regular file, or is malformed; names the line.
    """
    suffix = data_suffix(path.name)
    if suffix is None:
        raise DataError(f"{path}: expected a file ending in {', '.join(SUFFIXES)}.")
    with open_data(path) as file:
        yield from read_open(file, suffix, str(path), path.parent)


def data_suffix(name: str) -> str | None:
    """The kind of data that a file of this name holds, as one of `SUFFIXES`; None if it is none that is
    read.

    Text may be compressed, which parquet and Arrow are by themselves.
    """
    path = Path(name.lower())
    if path.suffix in PACKED:
        inner = Path(path.stem).suffix
        return inner if inner in SUFFIXES and inner not in _TABLES else None
    return path.suffix if path.suffix in SUFFIXES else None


def open_data(path: Path) -> BinaryIO:
    """A local file in binary mode, unpacked if its name says that it is compressed.

    Raises:
        DataError: it is no regular file, or cannot be opened.
    """
    refuse_special(path, DataError)
    return unpacked(_opened(path), path.name)


def unpacked(file: Any, name: str) -> BinaryIO:
    """An open file, unpacked if its name says that it is compressed; closing it closes the file."""
    packed = PACKED.get(Path(name).suffix.lower())
    if packed is not None:
        return cast("BinaryIO", _Unpacked(packed(file), file))
    return file if hasattr(file, "peek") else io.BufferedReader(file)


class _Unpacked(io.BufferedReader):
    """The content of a compressed file, which is closed with it: the standard library leaves it open."""

    def __init__(self, raw: Any, packed: Any) -> None:
        super().__init__(raw)
        self._packed = packed

    def close(self) -> None:
        super().close()
        self._packed.close()


def read_open(
    file: BinaryIO, suffix: str, name: str, folder: Path, delimiter: str | None = None
) -> Iterator[Row]:
    """`read_file` of an open file.

    Args:
        file: in binary mode, unpacked.
        suffix: which of `SUFFIXES`.
        name: for messages.
        folder: where paths in the rows begin.
        delimiter: what stands between the cells of CSV; by the suffix if None.

    Raises:
        DataError: it is malformed, or cannot be unpacked.
    """
    try:
        if suffix in _TABLES:
            yield from _TABLES[suffix](file, name, folder)
        else:
            yield from _text_rows(file, suffix, name, folder, delimiter)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as problem:
        hint = "make or download it again"
        raise unreadable(name, "cannot be read to its end", hint, problem, DataError) from problem


def _text_rows(
    file: BinaryIO, suffix: str, name: str, folder: Path, delimiter: str | None
) -> Iterator[Row]:
    if file.peek(2)[:2] in _UTF16:  # pyright: ignore[reportAttributeAccessIssue]
        raise DataError(f"{name} is UTF-16; save it as UTF-8.")
    readers: dict[str, Callable[[BinaryIO, str], Iterable[tuple[str, Any]]]] = {
        ".csv": lambda file, name: csv_cells(file, name, delimiter or ","),
        ".tsv": lambda file, name: csv_cells(file, name, delimiter or "\t"),
        ".json": _json_cells,
    }
    for where, cells in readers.get(suffix, _line_cells)(file, name):
        if not isinstance(cells, dict):
            raise DataError(f"{where} should be an object with columns.")
        yield Row(cast("dict[str, Any]", cells), where, folder)


def parsed_json(path: Path) -> Any:
    """The value of a whole JSON file, None where it holds several lines of JSON instead.

    Raises:
        DataError: it is neither, or not UTF-8.
    """
    refuse_special(path, DataError)
    with _opened(path) as file:
        try:
            return parse_json(_text(file.read(), str(path)))
        except json.JSONDecodeError as problem:
            if problem.msg == "Extra data":
                return None
            raise DataError(f"{path} is not JSON: {problem}.") from problem
        except ValueError as problem:
            if isinstance(problem, DataError):
                raise
            raise DataError(f"{path} is not JSON: {problem}.") from problem


def csv_cells(file: BinaryIO, name: str, delimiter: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV file with a header, each with its line.

    Columns without a name are left out, since spreadsheets write them where a cell was once used.

    Raises:
        DataError: a row has more or fewer cells than the header, a column without a name has
            content, quotes are broken, or it is not UTF-8.
    """
    csv.field_size_limit(LONGEST_CELL)  # the default refuses long texts
    # Strict: or a quote that is never closed swallows the rest of the file without a word.
    reader = csv.reader(_decoded_lines(file, name), delimiter=delimiter, strict=True)
    header: list[str] = []
    begins = 1
    try:
        for cells in reader:
            where, begins = f"{name}, line {begins}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _header(cells, name)
            elif len(cells) != len(header):
                raise DataError(
                    f"{where}: there are {len(cells)} cells for {len(header)} columns; put cells that hold "
                    f"a comma or a quote in quotes."
                )
            else:
                _require_names(header, cells, where)
                yield where, {key: cell for key, cell in zip(header, cells) if key}
    except csv.Error as problem:
        raise DataError(f"{name}, line {begins}: this is not CSV ({problem}).") from problem


def _decoded_lines(file: BinaryIO, name: str) -> Iterator[str]:
    for number, line in _lines(file, name):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as problem:
            raise _not_utf8(problem, f"{name}, line {number}") from problem


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines by their numbers; a small file that is packed may hold one that fills the memory."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{name}, line {number} has more than {LONGEST_LINE >> 20} MiB, but is one row; split it "
                f"into several."
            )
        yield number, line


def _header(cells: list[str], name: str) -> list[str]:
    """The names of columns, empty where there is none."""
    names = [cell if cell.strip() else "" for cell in cells]
    twice = {cell for cell in names if cell and names.count(cell) > 1}
    if twice:
        raise DataError(f"{name} has two columns named {min(twice)!r}; rename one.")
    return names


def _require_names(header: list[str], cells: list[str], where: str) -> None:
    """Refuse content without a name, but for a first column of row numbers, as pandas writes it."""
    for number, (key, cell) in enumerate(zip(header, cells), start=1):
        if not key and cell.strip() and not (number == 1 and cell.strip().isdecimal()):
            raise DataError(
                f"{where}: column {number} has content but no name in the header; name it or remove it."
            )


def _line_cells(file: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in _lines(file, name):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.isspace():
            where = f"{name}, line {number}"
            yield where, _parsed(line, where)


def _json_cells(file: BinaryIO, name: str) -> Iterator[tuple[str, Any]]:
    """A list of rows, one row, or rows on lines of their own."""
    content = file.read()
    try:
        value = parse_json(_text(content, name))
    except json.JSONDecodeError as problem:
        if problem.msg != "Extra data":
            raise DataError(f"{name} is not JSON: {problem}.") from problem
        yield from _line_cells(io.BytesIO(content), name)
        return
    except ValueError as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"{name} is not JSON: {problem}.") from problem
    if not isinstance(value, list):
        yield name, value
        return
    for number, cells in enumerate(cast("list[Any]", value), start=1):
        yield f"{name}, entry {number}", cells


def _parsed(line: bytes, where: str) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise _not_utf8(problem, where) from problem
    except ValueError as problem:
        raise DataError(f"{where} is not JSON: {problem}.") from problem


def _text(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise _not_utf8(problem, f"{name}, line {line}") from problem


def _not_utf8(problem: UnicodeDecodeError, where: str) -> DataError:
    byte = problem.object[problem.start]
    return DataError(
        f"{where} is not UTF-8 (byte 0x{byte:02x}); it may be Latin-1: save the file as UTF-8."
    )


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}.") from problem
