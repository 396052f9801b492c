"""The operating system's reasons for which a file cannot be written, in whoever's words they come.

Python's exceptions have a number. safetensors puts it into its text (`os error 28`). torch's writer says no
more than that its stream failed: of the reasons for that, a disk without room and a limit on the size of
files can be asked for.
"""

import errno
import os
import re
import shutil
from pathlib import Path

try:
    import resource
except ImportError:  # elsewhere than on Unix
    resource = None

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
OF_A_DISK = FULL | {errno.EFBIG, errno.EIO, errno.EROFS}
"""Numbers that no file has that is merely missing, or of another kind."""

ROOM = 1 << 20
"""Free bytes below which a disk is taken to be the reason for which a stream failed."""

_NUMBER = re.compile(r"\(os error (\d+)\)")
_FAILED_STREAM = ("iostream error", "StreamWriter failed", "unexpected pos", "file write failed")
"""Phrases of torch's writer whose stream failed, with no reason given."""


def error_number(problem: BaseException) -> int | None:
    """The system's number of an error, or of what caused it; None where there is none."""
    cause: BaseException | None = problem
    while cause is not None:
        number = getattr(cause, "errno", None)
        told = _NUMBER.search(str(cause))
        if isinstance(number, int):
            return number
        if told:
            return int(told[1])
        cause = cause.__cause__ or cause.__context__
    return None


def is_failed_stream(problem: BaseException) -> bool:
    """Return whether torch's writer could not write on."""
    text = str(problem) if isinstance(problem, RuntimeError) else ""
    return any(phrase in text for phrase in _FAILED_STREAM)


def writing_reason(path: Path, problem: BaseException) -> str:
    """The sentence, without its full stop, on what kept `path` from being written."""
    number = error_number(problem)
    if number is None and is_failed_stream(problem):
        number = errno.ENOSPC if _free(path) < ROOM else errno.EFBIG if _has_limit() else errno.EIO
    if number in FULL:
        return (
            f"The disk is full while writing {path} ({_free(path) / 2**20:.0f} MiB free); free some space "
            f"and run the same command again, it continues where it stopped"
        )
    if number == errno.EFBIG:
        return (
            f"{path} would be larger than the limit on the size of files allows (ulimit -f); raise it and "
            f"run the same command again, it continues where it stopped"
        )
    if number == errno.EIO:
        return (
            f"The disk failed while writing {path} (input/output error); run the same command again once it "
            f"works, or write to another one"
        )
    return f"Cannot write {path}: {problem if number is None else os.strerror(number)}"


def _free(path: Path) -> int:
    folder = path.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _has_limit() -> bool:
    return resource is not None and resource.getrlimit(resource.RLIMIT_FSIZE)[0] >= 0
