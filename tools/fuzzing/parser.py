"""A parser under test: a folder with a valid file, what reads it, and what must hold of what it accepts."""

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from emloc.artefacts.seal import sealed


def _json(value):
    return json.dumps(value).encode()


def _sealed(value):
    """JSON whose seal is right whatever an edit made of the rest."""
    return _json(sealed(value) if isinstance(value, dict) else value)


def _yaml(value):
    return yaml.safe_dump(value, sort_keys=False).encode()


def _lines(value):
    rows = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _csv(value):
    """A table: a list of rows of cells; whatever else an edit made of it is written as text."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    for row in value if isinstance(value, list) else [value]:
        writer.writerow([str(cell) for cell in row] if isinstance(row, list) else [str(row)])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _text(value):
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")


def _markdown(value):
    return b"---\n" + _yaml(value) + b"---\n# Card\n"


def _safetensors(value):
    """A header `value["header"]` before as many bytes of data as `value["data"]` says."""
    value = value if isinstance(value, dict) else {"header": value}
    data = value.get("data")
    header = json.dumps(value.get("header")).encode()
    length = value.get("length")
    length = length if isinstance(length, int) and 0 <= length < 2**64 else len(header)
    size = data if isinstance(data, int) and 0 <= data < 1 << 16 else 0
    return length.to_bytes(8, "little") + header + bytes(size)


FORMS: dict[str, Callable[[Any], bytes]] = {
    "json": _json, "sealed": _sealed, "yaml": _yaml, "jsonl": _lines, "csv": _csv, "text": _text,
    "markdown": _markdown, "safetensors": _safetensors,
}  # fmt: skip


@dataclass(frozen=True)
class Parser:
    """One parser.

    Attributes:
        name: of what is read.
        folder: where it lies; of the fuzzer's own, and made anew for each run.
        file: the path in it whose content is edited.
        form: one of `FORMS`, by which a document becomes bytes; `bytes`: seeds are bytes, edited as such.
        seeds: valid documents.
        read: the code under test; gets the folder.
        means: asserts what must be true of what it returned, by other means than the code's own.
        cost: milliseconds of one input, roughly; dear parsers get fewer inputs.
    """

    name: str
    folder: Path
    file: str
    form: str
    seeds: Sequence[Any]
    read: Callable[[Path], Any]
    means: Callable[[Path, Any], None] = lambda folder, result: None
    cost: float = 1

    def write(self, document: Any) -> bytes:
        """A document as the file's bytes; one that YAML or JSON cannot say is text of some kind."""
        try:
            return FORMS[self.form](document)
        except (ValueError, RecursionError, yaml.YAMLError):
            return repr(document).encode("utf-8", "replace")
