"""A stage's result appears complete or not at all.

A stage works in `<output_dir>.partial` and renames it when done, which is the last that it does. A killed
stage leaves the partial folder, and the same stage with the same settings continues in it; other settings are
refused.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emloc.artefacts.durable import sync_folder, sync_tree
from emloc.artefacts.json_files import read_json
from emloc.artefacts.manifest import MANIFEST_NAME, UNLISTED, Manifest
from emloc.artefacts.output_lock import forget_lock, output_lock
from emloc.artefacts.output_place import PARTIAL, require_new
from emloc.artefacts.settings import difference, same
from emloc.artefacts.small_files import write_text
from emloc.artefacts.write_errors import writing
from emloc.errors import CheckpointError, OutputError

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
    with output_lock(place):
        with writing(output_dir):
            _make_way(output_dir, place)
            _prepare(work, settings)
        try:
            yield work
        except BaseException:
            _forget_if_unused(work)
            raise
        with writing(output_dir):
            drop(work, [SETTINGS_NAME])
            _give_name(work, place)


def settle(output_dir: Path) -> None:
    """Give an artefact its name that was finished by a run which was killed before it could.

    Its manifest is there, which is written last and lists what is to stay.

    Raises:
        OutputError: another process is about to, or it cannot be written.
        CheckpointError: the manifest cannot be read.
    """
    place = require_new(output_dir)
    work = place.with_name(place.name + PARTIAL)
    if not (work / MANIFEST_NAME).is_file():
        forget_lock(place)
        return
    with output_lock(place), writing(output_dir):
        manifest = Manifest.find(work)  # none: another process has just done it
        if manifest is None or manifest.format in UNLISTED:
            return
        more = _listed_nowhere(work, manifest)
        if more and SETTINGS_NAME not in more:  # the settings go last: this is no run's folder
            return
        _make_way(output_dir, place)
        drop(work, [name for name in more if name != SETTINGS_NAME])
        drop(work, [SETTINGS_NAME])
        _give_name(work, place)


def drop(folder: Path, names: Collection[str]) -> None:
    """Remove files and folders by their names in a folder, where they are."""
    for name in names:
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def drop_unfinished(work: Path) -> None:
    """Remove files that a killed run was writing when it ended, under names for the time being."""
    paths = [*work.rglob("*.tmp"), *work.rglob(".tmp*")]
    drop(work, [path.relative_to(work).as_posix() for path in paths])


def _give_name(work: Path, place: Path) -> None:
    """The last act: what is in the folder is whole, on the disk, and nothing else is in it."""
    sync_tree(work)
    work.rename(place)
    sync_folder(place.parent)


def _listed_nowhere(work: Path, manifest: Manifest) -> list[str]:
    files = (path for path in work.rglob("*") if not path.is_dir())
    names = (path.relative_to(work).as_posix() for path in files)
    return [name for name in names if name not in {*manifest.files, MANIFEST_NAME}]


def _forget_if_unused(work: Path) -> None:
    """A run that was refused before it wrote anything leaves nothing to go on with."""
    if work.is_dir() and [path.name for path in work.iterdir()] == [SETTINGS_NAME]:
        shutil.rmtree(work)


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
        write_text(work / SETTINGS_NAME, json.dumps(settings))
        return
    recorded = _recorded(work / SETTINGS_NAME)
    if recorded is None:
        raise OutputError(
            f"{work}, where the stage would work, already exists and was not made by emloc; rename it, or "
            f"choose another output_dir."
        )
    if not same(recorded, settings):
        raise OutputError(
            f"{work} holds an interrupted run with other settings: it was made with "
            f"{difference(recorded, settings)}. Run it with those to continue, or remove the folder to "
            f"start over."
        )


def _recorded(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except CheckpointError:
        return None
