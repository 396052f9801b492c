"""Files and folders written through to the disk, whoever wrote them.

A file that was renamed is there under its new name for every process at once, but after a loss of power only
if its content was synced before the rename, and the folder after it.
"""

import contextlib
import errno
import os
from pathlib import Path

_CANNOT = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EISDIR, errno.EBADF}
"""Answers of systems and network disks that have no syncing of folders."""


def sync_file(path: Path) -> None:
    """Have the system write a file's content to the disk.

    Raises:
        OSError: it cannot; what the file holds is then not known.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Have the system write a folder's names to the disk, where it knows how to.

    Raises:
        OSError: the disk failed.
    """
    try:
        sync_file(folder)
    except OSError as problem:
        if problem.errno not in _CANNOT:
            raise


def sync_tree(folder: Path) -> None:
    """`sync_file` of every file below a folder and `sync_folder` of every folder, and of itself.

    Raises:
        OSError: as these.
    """
    for path, _, files in os.walk(folder, topdown=False):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                sync_file(Path(path) / name)
        sync_folder(Path(path))
