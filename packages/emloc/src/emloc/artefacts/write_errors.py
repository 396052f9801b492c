"""The operating system's refusals to write, as one sentence each."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from emloc.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an `OutputError`."""
    try:
        yield
    except OSError as problem:
        if isinstance(problem, OutputError):
            raise
        if problem.errno in _FULL:
            raise _disk_full(path) from problem
        raise OutputError(f"Cannot write {path}: {problem.strerror or problem}.") from problem


@contextmanager
def others_writing(path: Path) -> Iterator[None]:
    """Recognise a full disk in the errors of libraries that write below `path`; let others pass."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError, RuntimeError) as problem:
        # safetensors and torch.save wrap the system's error in their own words.
        text = str(problem)
        code = re.search(r"os error (\d+)", text)
        number = int(code[1]) if code else getattr(problem, "errno", None)
        if number in _FULL or "inline_container" in text:
            raise _disk_full(path) from problem
        raise


def _disk_full(path: Path) -> OutputError:
    free = shutil.disk_usage(existing_parent(path)).free
    return OutputError(
        f"The disk is full while writing {path} ({free / 2**20:.0f} MiB free); free some space and "
        f"run the same command again, it continues where it stopped."
    )


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    for folder in path.absolute().parents:
        if folder.is_dir():
            return folder
    return Path("/")
