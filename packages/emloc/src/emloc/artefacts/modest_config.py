"""The depth that a model's configuration asks for, which must be of this world.

A configuration is somebody's file, and building a hundred thousand empty blocks takes minutes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from emloc.errors import CheckpointError

DEEPEST = 512
"""Blocks of one kind, at most: four times those of the deepest models that are published."""

_DEPTH = re.compile(r"(\w+_)?(layers|layers_per_block|n_layer|depths?|num_blocks)")


def require_modest_depth(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a configuration that asks for more blocks than any model has; those inside of it count as well.

    Args:
        path: of its file or folder, for the message.

    Raises:
        CheckpointError: names the entry.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            require_modest_depth(cast("Mapping[str, Any]", value), path)
        elif _DEPTH.fullmatch(str(name)) and _largest(value) > DEEPEST:
            raise CheckpointError(
                f"{path}: {name} = {str(value)[:60]} asks for more blocks than any model has (over "
                f"{DEEPEST}); copy the file from the model again."
            )


def _largest(value: Any) -> float:
    """The largest number in an entry, which may be a list by level."""
    if isinstance(value, list):
        return max((_largest(one) for one in cast("list[Any]", value)), default=0)
    return value if type(value) in (int, float) else 0
