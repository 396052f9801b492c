"""The operating system's refusals to write, as one sentence each."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from emloc.errors import OutputError
from emloc.machine.disk_errors import OF_A_DISK, error_number, is_failed_stream, writing_reason


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write into an `OutputError`."""
    try:
        yield
    except OSError as problem:
        if isinstance(problem, OutputError):
            raise
        raise OutputError(f"{writing_reason(path, problem)}.") from problem


@contextmanager
def others_writing(path: Path) -> Iterator[None]:
    """Recognise a failing disk in the errors of libraries that write below `path`; let others pass."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError, RuntimeError) as problem:
        # safetensors and torch.save wrap the system's error in their own words, or keep it to themselves.
        if error_number(problem) in OF_A_DISK or is_failed_stream(problem):
            raise OutputError(f"{writing_reason(path, problem)}.") from problem
        raise
