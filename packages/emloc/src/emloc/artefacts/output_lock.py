"""One process at a time writes an output.

The lock is a file beside the output, so that all meet at it who can reach the output, under whatever name,
from another container or with another folder for temporary files. The system lets go of it when a process
ends, however it ends; the file is removed by whoever held it, and one that a killed process left is taken up
by the next.
"""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from emloc.artefacts.output_place import LOCK
from emloc.artefacts.write_errors import writing
from emloc.errors import OutputError


@contextmanager
def output_lock(place: Path) -> Iterator[None]:
    """Hold the lock of an output.

    Args:
        place: the output's resolved path.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    path = place.with_name(place.name + LOCK)
    lock = FileLock(str(path))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as problem:
            raise OutputError(
                f"Another process is writing {place}; wait for it to finish."
            ) from problem
    try:
        yield
    finally:
        # Removed while it is held: one who had opened it finds that it locked no name, and begins anew.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def forget_lock(place: Path) -> None:
    """Remove the file of a lock that a killed process left beside an output; one that is held stays."""
    if place.with_name(place.name + LOCK).exists():
        with contextlib.suppress(OutputError), output_lock(place):
            pass
