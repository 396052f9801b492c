"""The outer edge of a stage: whatever leaves it is one sentence, of `emloc.errors`.

What was foreseen is such an error already. What was not becomes one here, with the exception as its cause: a
failed allocation and a failing disk keep their kinds and exit codes, and the rest is an `UnexpectedError`.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from emloc.errors import EmlocError, MemoryLimitError, OutputError, UnexpectedError
from emloc.machine.disk_errors import OF_A_DISK, error_number, is_failed_stream, writing_reason
from emloc.machine.memory_limit import is_out_of_memory

DEBUG = "--debug"
"""The flag of the command line with which an error is shown with all that led to it."""

_SHOWN = 200
_PANIC = "PanicException"
"""A failure inside of a library in Rust; it is no `Exception`."""


@contextmanager
def boundary(what: str) -> Iterator[None]:
    """Let errors of `emloc.errors` pass, and make all others one of them.

    Args:
        what: is done within, for messages.

    Raises:
        EmlocError: instead of any other exception, which is its cause. Interruptions pass.
    """
    try:
        yield
    except EmlocError:
        raise
    except BaseException as problem:
        if not isinstance(problem, Exception) and type(problem).__name__ != _PANIC:
            raise
        raise _explained(what, problem) from problem


def _explained(what: str, problem: BaseException) -> EmlocError:
    if is_out_of_memory(problem):
        return MemoryLimitError(
            f"{what}: there was not enough memory ({_first_line(problem)}); free some, take a smaller batch "
            f"or shorter samples, or see emloc plan for what fits."
        )
    if error_number(problem) in OF_A_DISK or is_failed_stream(problem):
        named = getattr(problem, "filename", None)
        place = Path(named) if isinstance(named, str) else Path("a file")
        return OutputError(f"{what}: {writing_reason(place, problem)}.")
    return UnexpectedError(
        f"{what} met an unexpected error: {_first_line(problem)}, at {_place(problem)}; run it again with "
        f"{DEBUG} and report what it shows."
    )


def _first_line(problem: BaseException) -> str:
    kind, text = type(problem).__name__, " ".join(str(problem).split())
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return f"{kind}: {shown.rstrip('.')}" if shown else kind


def _place(problem: BaseException) -> str:
    """File and line where it arose, by the package's folder."""
    frames = traceback.extract_tb(problem.__traceback__)
    if not frames:
        return "an unknown place"
    path = Path(frames[-1].filename)
    return f"{'/'.join(path.parts[-3:])}:{frames[-1].lineno}"
