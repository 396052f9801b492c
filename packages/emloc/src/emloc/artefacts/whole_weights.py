"""The refusal of weights that lack some of a model's: libraries draw those at random, and only warn."""

from collections.abc import Collection
from pathlib import Path

from emloc.errors import CheckpointError


def require_whole(path: Path, missing: Collection[str]) -> None:
    """Refuse a model of which some parameters were in no file.

    Args:
        missing: their names.

    Raises:
        CheckpointError: there are such.
    """
    if missing:
        first, others = min(missing), len(missing) - 1
        more = f" and {others} more" if others else ""
        raise CheckpointError(
            f"{path} holds no tensor for {first}{more}, which would be initialised at random; check that "
            f"all of its files are there, and that its config.json names the class that was saved."
        )
