"""Files that other files name, kept inside the folder that they are named in.

A model, an adapter or a data set is somebody else's folder. Its index names shards, its `model_index.json`
components, its rows images; each name could as well be `../../.ssh/id_rsa`, or a link that leads there, and
what is read ends up in artefacts that people publish. Every such name is resolved here: links are followed,
and where they lead must lie in the folder. The hub's cache is the one exception: a snapshot's files are
links to the blobs of its own repository.
"""

from pathlib import Path, PurePosixPath, PureWindowsPath

from emloc.errors import CheckpointError, EmlocError
from emloc.machine.special_files import refuse_special

LONGEST, LONGEST_PATH = 255, 3000
"""Bytes of a name, and of a path, that file systems take."""


def named_path(
    folder: Path, name: object, where: object, error: type[EmlocError] = CheckpointError
) -> Path:
    """The path of what `name` means in `folder`, which need not exist.

    Args:
        folder: what the name must stay inside of.
        name: as it stands in a file; relative to `folder`, or an absolute path inside of it.
        where: the file that holds the name, for messages.
        error: what is raised.

    Raises:
        EmlocError: of the type `error`: the name is no text, it or a link leads out of the folder, or it is
            that of a pipe, a socket or a device.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name or _is_broken(name):
        raise error(f"{where} names {ascii(name)[:80]}, which is not a file name; correct it.")
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    if any(len(part.encode()) > LONGEST for part in parts) or len(name) > LONGEST_PATH:
        raise error(
            f"{where} names {name[:80]!r}…, which is longer than any file name; correct it."
        )
    path = folder / name
    inside = _lies_inside(path, folder, where, error)
    if ".." in parts or (Path(name).is_absolute() and not inside):
        raise error(
            f"{where} names {name}, which lies outside {folder}; nothing outside it is read."
        )
    if not inside:
        raise error(
            f"{path} is a link that leads out of {folder}, to {path.resolve()}; nothing outside the folder "
            f"is read, so put the file itself there."
        )
    refuse_special(path, error)
    return path


def named_file(
    folder: Path, name: object, where: object, error: type[EmlocError] = CheckpointError
) -> Path:
    """`named_path` of an existing file.

    Raises:
        EmlocError: as `named_path`, or there is no such file.
    """
    path = named_path(folder, name, where, error)
    if not path.is_file():
        raise error(f"{where} names {name}, but {folder} has no such file.")
    return path


def _is_broken(name: str) -> bool:
    """Return whether a name holds half of a character, which no file system takes."""
    return any("\ud800" <= character <= "\udfff" for character in name)


def _lies_inside(path: Path, folder: Path, where: object, error: type[EmlocError]) -> bool:
    try:
        real, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as problem:  # a link in a circle, a name too long
        raise error(f"{where} names {path.name}, which cannot be resolved: {problem}.") from problem
    return any(real.is_relative_to(allowed) for allowed in (home, *_blobs(home)))


def _blobs(home: Path) -> list[Path]:
    """The folder of the hub's cache that the files of a snapshot link to."""
    return [
        parent.parent / "blobs"
        for parent in home.parents
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir()
    ]
