"""The pictures among a folder's files, and a word on the files that are not read."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from emloc.artefacts.named_files import named_path
from emloc.errors import DataError
from emloc.integrations.pictures import picture_suffixes
from emloc.machine.progress import warn

CAPTION = ".txt"
"""The end of the name of the file that says what the picture of its name shows."""


def picture_files(folder: Path, option: str, has_captions: bool) -> list[Path]:
    """The picture files of a folder, by name; what else is there is counted and named on one line.

    Hidden files are passed over; hidden pictures are counted.

    Args:
        folder: folders in it are not looked into.
        option: that names it, for messages.
        has_captions: whether text files of the pictures' names are read as well.

    Raises:
        DataError: there is no such folder, it cannot be read, it has no pictures, or one of them is a link
            out of it, a pipe or a device.
    """
    if not folder.is_dir():
        raise DataError(f"{option}: there is no folder {folder}; correct the path.")
    try:
        entries = sorted(folder.iterdir())
    except OSError as problem:
        raise DataError(
            f"{option}: the folder {folder} cannot be read ({problem.strerror}); correct its permissions."
        ) from problem
    visible = [path for path in entries if not path.name.startswith(".")]
    if not visible:
        raise DataError(f"{option}: the folder {folder} is empty; put pictures into it.")
    files = [path for path in visible if is_picture(path)]
    if not files:
        raise DataError(
            f"{option}: the folder {folder} has no pictures, only {some([p.name for p in visible])}; files "
            f"that Pillow can read count as pictures: png, jpg, webp, gif, tif and the like."
        )
    for path in files:
        named_path(folder, path.name, option, DataError)
    captions = {path.with_suffix(CAPTION) for path in files} if has_captions else set[Path]()
    hidden = [path for path in entries if path not in visible and is_picture(path)]
    unread = [path for path in visible if path not in captions and path not in files]
    _say_unread(unread + hidden, files, folder)
    return files


def is_picture(path: Path) -> bool:
    """Return whether a file is a picture by its name, and no folder."""
    return path.suffix.lower() in picture_suffixes() and not path.is_dir()


def some(names: Sequence[str]) -> str:
    """The first names."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _say_unread(unread: Sequence[Path], read: Sequence[Path], folder: Path) -> None:
    """`3 of 9 files in dog are not read: 2 .heic, 1 folder (a.heic, b.heic, more)`."""
    if not unread:
        return
    captions = {path.with_suffix(CAPTION) for path in read}

    def kind(path: Path) -> str:
        if path in captions:
            return "captions (one prompt is given for all)"
        if path.name.startswith("."):
            return "hidden"
        return "folder" if path.is_dir() else path.suffix.lower() or "without suffix"

    kinds = Counter(map(kind, unread)).most_common()
    warn(
        f"{len(unread)} of {len(unread) + len(read)} files in {folder} are not read: "
        f"{', '.join(f'{count} {name}' for name, count in kinds)}: "
        f"{some([path.name for path in unread])}"
    )
