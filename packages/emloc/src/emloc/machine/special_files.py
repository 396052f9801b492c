"""Pipes, sockets and devices, refused without being opened: reading one may never end."""

import stat
from pathlib import Path

from emloc.errors import CheckpointError, EmlocError


def refuse_special(path: Path, error: type[EmlocError] = CheckpointError) -> None:
    """Let files, folders and what does not exist pass; what is none of these is never opened.

    Raises:
        EmlocError: of the type `error`: it is a pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # whoever opens it says why it cannot be
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise error(f"{path} is a {_kind(mode)}, not a file; it is not opened.")


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"
