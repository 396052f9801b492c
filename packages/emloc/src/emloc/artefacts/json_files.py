"""JSON objects that lie in a file: configurations, indices, manifests."""

from pathlib import Path
from typing import Any, cast

from emloc.artefacts.read_errors import unreadable
from emloc.errors import CheckpointError
from emloc.machine.bounded_json import MOST_BYTES, parse_document
from emloc.machine.special_files import refuse_special


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk, within the limits of `bounded_json`.

    Raises:
        CheckpointError: the file is missing, is a pipe or a device, or is no JSON object within the limits.
    """
    try:
        content: Any = parse_document(read_text(path))
    except ValueError as problem:
        if isinstance(problem, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read as JSON: {problem}.") from problem
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object.")
    return cast("dict[str, Any]", content)


def read_text(path: Path) -> str:
    """The text of a file beside a model's weights, such as a template.

    Raises:
        CheckpointError: it is missing, a pipe or a device, not UTF-8, or larger than any such file.
    """
    refuse_special(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise CheckpointError(f"{path} is {size >> 20} MiB, larger than any file of its kind.")
        return path.read_text("utf-8")
    except FileNotFoundError as problem:
        raise CheckpointError(
            f"{path} does not exist; is {path.parent} a complete model?"
        ) from problem
    except UnicodeDecodeError as problem:
        raise CheckpointError(
            f"{path} is not UTF-8 (byte {problem.start}); download it again."
        ) from problem
    except OSError as problem:
        hint = "download it again"
        raise unreadable(path, "cannot be read", hint, problem) from problem
