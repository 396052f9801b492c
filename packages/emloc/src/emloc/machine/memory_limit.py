"""Hold this process to an amount of memory: at most so many bytes more than it holds already.

CUDA: a share of the card for torch's allocator. CPU: the soft limit RLIMIT_DATA, in which Linux counts
private writable mappings, so that an allocation beyond it fails in this process and nobody is killed.
Mapped checkpoint files are not counted: their pages are the system's to take back. What the C library's heap
had free at the start is mapped already, so a process may come to hold that much more (tens of MiB). Where
neither limit exists, nothing is held and `can_limit` says so.
"""

import errno
from collections.abc import Callable
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # elsewhere than on Unix
    resource = None

CUDA_CONTEXT = 512 << 20
"""Bytes that the context and its kernels take of a card, which torch's allocator does not count."""

_STATUS = Path("/proc/self/status")

SIGNS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "could not create a memory object",
    "can't start new thread",
)
"""Phrases that libraries use when an allocation fails, beside raising MemoryError."""


def can_limit(device: str) -> bool:
    """Return whether a limit on this device's memory can be kept here."""
    return device.startswith("cuda") or (resource is not None and _STATUS.exists())


def limit_memory(device: str, count: int) -> Callable[[], None]:
    """Begin; returns the function that lifts the limit.

    Args:
        device: cuda, cuda:1, …: torch's allocator gets what `count` bytes leave beside the context;
            cpu: this process may map `count` bytes more than it has mapped.
    """
    if device.startswith("cuda"):
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, max(0, count - CUDA_CONTEXT) / whole), device
        )
        return lambda: torch.cuda.set_per_process_memory_fraction(1.0, device)
    if resource is None or not can_limit(device):
        return lambda: None
    kind, setter = resource.RLIMIT_DATA, resource.setrlimit
    before, most = resource.getrlimit(kind)
    wanted = _data_bytes() + count
    setter(kind, (min([wanted, *(n for n in (before, most) if n >= 0)]), most))
    return lambda: setter(kind, (before, most))


def is_out_of_memory(problem: BaseException) -> bool:
    """Return whether a failed allocation is at the bottom of it."""
    cause: BaseException | None = problem
    while cause is not None:
        if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if any(sign in str(cause).lower() for sign in SIGNS):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _data_bytes() -> int:
    """The bytes that Linux holds against RLIMIT_DATA."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no VmData")
