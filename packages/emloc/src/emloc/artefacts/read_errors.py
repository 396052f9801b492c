"""The errors of libraries that read somebody's file or build something of it, as one sentence each.

Files come from anywhere, and what a broken one makes a library raise is nearly anything. It is the file's
fault all the same, unless memory ran out or the system refused: these have sentences of their own.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emloc.errors import CheckpointError, EmlocError, MemoryLimitError
from emloc.machine.disk_errors import error_number
from emloc.machine.memory_limit import is_out_of_memory

_SHOWN = 300
_OF_THE_SYSTEM = {
    errno.EMFILE: "too many files are open (raise ulimit -n)",
    errno.ENFILE: "too many files are open system-wide",
    errno.EACCES: "permission denied",
    errno.EIO: "the disk failed (input/output error)",
    errno.ESTALE: "the network file system has lost it",
}


@contextmanager
def reading(
    path: Path | str, what: str, hint: str, error: type[EmlocError] = CheckpointError
) -> Iterator[None]:
    """Let what is of `emloc.errors` pass, and make of all others one sentence: `{path} {what} (why); {hint}.`

    Args:
        what: cannot be done with the file, such as `cannot be read`.
        hint: what to do if it is the file's fault.
        error: that is raised then.

    Raises:
        MemoryLimitError: memory ran out.
        EmlocError: of the type `error`.
    """
    try:
        yield
    except EmlocError:
        raise
    except Exception as problem:
        raise unreadable(path, what, hint, problem, error) from problem


def unreadable(
    path: Path | str,
    what: str,
    hint: str,
    problem: Exception,
    error: type[EmlocError] = CheckpointError,
) -> EmlocError:
    """The error that `reading` makes of a library's."""
    if is_out_of_memory(problem):
        return MemoryLimitError(
            f"There was not enough memory for {path} ({first_line(problem)}); free some, or see emloc plan "
            f"for what fits."
        )
    number = error_number(problem)
    if number in _OF_THE_SYSTEM:
        reason = _OF_THE_SYSTEM[number]
        return error(f"{path} {what}: {reason}.")
    return error(f"{path} {what} ({first_line(problem)}); {hint}.")


def first_line(problem: BaseException) -> str:
    """An exception in a few words, without its full stop."""
    number = getattr(problem, "errno", None)
    text = os.strerror(number) if isinstance(number, int) else str(problem)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    shown = lines[0] if lines else type(problem).__name__
    return (shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…").rstrip(".")
