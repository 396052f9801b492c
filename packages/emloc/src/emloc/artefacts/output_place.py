"""The places where a result may go, checked before any work and not after it.

`Place` is `output_dir` as the system sees it: absolute, links followed. What is asked is whether its name can
be a folder's, what is there now, and whether a folder can be made there.
"""

import os
import stat
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from emloc.errors import OutputError
from emloc.options.marks import NamesData, marked

PARTIAL = ".partial"
"""The end of a folder's name while a stage works in it."""

LOCK = f"{PARTIAL}.lock"
"""The end of the name of the lock's file."""

ANOTHER = "choose another output_dir"


def require_new(output_dir: Path) -> Path:
    """The place of a folder that is to be made, or is complete already.

    Raises:
        OutputError: no folder can be made there, or something else is there.
    """
    place = _place(output_dir)
    if Path.cwd().is_relative_to(place):
        what = "the current folder" if Path.cwd() == place else f"above {Path.cwd()}"
        raise OutputError(
            f"output_dir {output_dir} is {what}, but a stage makes a new folder; name one inside it."
        )
    _look(output_dir, place.with_name(place.name + LOCK))
    if not place.exists() or not any(_entries(output_dir, place)):
        _require_writable(output_dir, place.parent)
    return place


def require_folder(output_dir: Path) -> Path:
    """The place of a folder that files are written into, there already or not.

    Raises:
        OutputError: it is none, or nothing can be written into it.
    """
    place = _place(output_dir)
    _require_writable(output_dir, place)
    return place


def has_place(config: BaseModel) -> None:
    """Refuse a stage whose result has no place; see `require_new` and `require_apart`."""
    options: Any = config
    require_new(options.output_dir)
    require_outside_data(config)


def require_outside_data(config: BaseModel) -> None:
    """Refuse results in a folder of data that the options name; see `require_apart`."""
    options: Any = config
    for name in marked(type(config), NamesData):
        named: Any = getattr(config, name)
        for folder in str(named).split(",") if named else ():
            require_apart(options.output_dir, name, folder)


def require_apart(output_dir: Path, name: str, folder: str | Path | None) -> None:
    """Refuse results inside a folder of data: they would be part of the data the next time.

    Args:
        name: of the option that names the folder.
        folder: a file, a folder, or nothing on this disk.

    Raises:
        OutputError: `output_dir` is the folder, or lies in it.
    """
    if folder is None or not os.path.isdir(folder):
        return
    real = Path(os.path.realpath(folder))
    if _place(output_dir).is_relative_to(real):
        raise OutputError(
            f"output_dir {output_dir} lies in {name} {folder}, where its files would count as data; "
            f"{ANOTHER}."
        )


def _place(output_dir: Path) -> Path:
    try:
        place = Path(os.path.realpath(output_dir))
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        raise OutputError(
            f"Cannot write {_printable(output_dir)}: {problem}; {ANOTHER}."
        ) from problem
    status = _look(output_dir, Path(os.path.abspath(output_dir)))
    behind = _look(output_dir, place)
    if status is not None and (
        behind is None or stat.S_ISLNK(behind.st_mode)
    ):  # or a loop of links
        raise OutputError(
            f"output_dir {output_dir} is a link to {place}, which does not exist; make that folder, or "
            f"{ANOTHER}."
        )
    if behind is not None and not stat.S_ISDIR(behind.st_mode):
        raise OutputError(f"output_dir {output_dir} is a file; {ANOTHER}.")
    return place


def _look(output_dir: Path, path: Path) -> os.stat_result | None:
    """The status of a path, of a link itself; None where there is nothing."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        why = getattr(problem, "strerror", None) or str(problem)
        raise OutputError(f"Cannot write {_printable(output_dir)}: {why}; {ANOTHER}.") from problem


def _entries(output_dir: Path, place: Path) -> list[str]:
    try:
        return os.listdir(place)
    except OSError as problem:
        raise OutputError(f"Cannot read {output_dir}: {problem.strerror}; {ANOTHER}.") from problem


def _require_writable(output_dir: Path, folder: Path) -> None:
    """The nearest folder that exists lets others be made in it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise OutputError(f"Cannot write {output_dir}: {folder} is a file; {ANOTHER}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(
            f"Cannot write {output_dir}: no permission to write into {folder}; {ANOTHER}."
        )


def _printable(path: Path) -> str:
    text = str(path)
    shown = text if len(text) <= 80 else f"{text[:79]}…"
    return shown if shown.isprintable() else ascii(shown)
