"""A stage's result appears complete or not at all.

A stage works in `<output_dir>.partial` and renames it when done. A killed stage leaves the partial
folder, and the same stage with the same settings continues in it; other settings are refused.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from emloc.artefacts.output_place import PARTIAL, require_new
from emloc.artefacts.settings import difference, same
from emloc.artefacts.small_files import write_text
from emloc.artefacts.write_errors import writing
from emloc.errors import OutputError

SETTINGS_NAME = "stage_settings.json"
_UNFINISHED = SETTINGS_NAME + ".tmp"
"""All that is left of a run that was killed before it had begun."""


@contextmanager
def stage_folder(output_dir: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """The folder to work in; becomes `output_dir` when the block ends without an error.

    Raises:
        OutputError: `output_dir` exists, another process is writing it, an interrupted run with other
            settings is in its place, or it cannot be written.
    """
    place = require_new(output_dir)
    work = place.with_name(place.name + PARTIAL)
    with _locked(place):
        with writing(output_dir):
            _make_way(output_dir, place)
            _prepare(work, settings)
        try:
            yield work
        except BaseException:
            _forget_if_unused(work)
            raise
        with writing(output_dir):
            work.rename(place)
            (place / SETTINGS_NAME).unlink()


def _forget_if_unused(work: Path) -> None:
    """A run that was refused before it wrote anything leaves nothing to go on with."""
    if [path.name for path in work.iterdir()] == [SETTINGS_NAME]:
        shutil.rmtree(work)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    # The lock lies in the system's temporary folder and stays there: a lock file that is removed
    # could be held twice, and the user's folder is not the place for it.
    key = hashlib.sha256(str(place).encode()).hexdigest()[:24]
    path = Path(tempfile.gettempdir()) / f"emloc-{key}.lock"
    lock = FileLock(str(path))
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except Timeout as problem:
            raise OutputError(
                f"Another process is writing {place}; wait for it to end."
            ) from problem
    try:
        yield
    finally:
        lock.release()


def _make_way(output_dir: Path, place: Path) -> None:
    """Nothing may be in the place of the result, and that is found out before the work, not after."""
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
    if place.exists():
        raise OutputError(
            f"{output_dir} exists and is not empty; nothing is ever overwritten, so choose another "
            f"output_dir or remove it."
        )


def _prepare(work: Path, settings: Mapping[str, Any]) -> None:
    """Make the working folder, or check that it is this run's own."""
    begun = [path for path in work.iterdir() if path.name != _UNFINISHED] if work.exists() else []
    if not begun:
        work.mkdir(parents=True, exist_ok=True)
        write_text(work / SETTINGS_NAME, json.dumps(settings, sort_keys=True))
        return
    recorded = _recorded(work / SETTINGS_NAME)
    if recorded is None:
        raise OutputError(
            f"{work}, in which the stage would work, is there already and holds no run of ours; rename "
            f"it, or choose another output_dir."
        )
    if not same(recorded, settings):
        raise OutputError(
            f"{work} holds an interrupted run with other settings: it was made with "
            f"{difference(recorded, settings)}. Run it with those to go on, or remove the folder to "
            f"start over."
        )


def _recorded(path: Path) -> dict[str, Any] | None:
    try:
        content: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", content) if isinstance(content, dict) else None
