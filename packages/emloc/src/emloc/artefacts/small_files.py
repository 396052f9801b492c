"""Small files, written under a temporary name, synced and renamed, so whatever is there is whole."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc.artefacts.write_errors import writing


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is in memory atomically."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, readable and with a final newline."""
    write_bytes(path, json_text(content))


def json_text(content: Mapping[str, Any]) -> bytes:
    """A JSON object as `write_json` writes it."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    temporary = target.with_name(target.name + ".tmp")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(target)
