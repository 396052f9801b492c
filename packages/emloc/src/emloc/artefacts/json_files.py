"""JSON objects that lie in a file: configurations, indices, manifests."""

import json
from pathlib import Path
from typing import Any, cast

from emloc.errors import CheckpointError
from emloc.machine.special_files import refuse_special


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from disk.

    Raises:
        CheckpointError: the file is missing, is a pipe or a device, or is not a JSON object.
    """
    refuse_special(path)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise CheckpointError(
            f"{path} does not exist; is {path.parent} a complete model?"
        ) from problem
    except (ValueError, OSError, RecursionError) as problem:
        raise CheckpointError(f"{path} cannot be read as JSON: {problem}.") from problem
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object.")
    return cast("dict[str, Any]", content)
