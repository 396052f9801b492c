"""Measure what a stage holds: peak memory of this process, sampled, over its start.

Stages that stream count anonymous memory (resident less mapped, of /proc), which leaves out memory-mapped
checkpoint files: their pages are read once and the system takes them back when it needs them.
Training and evaluation count all resident memory: on a CPU, transformers leaves weights in
the mapped file, and they are used in every step. Where /proc is missing, psutil stands in. On CUDA
the allocator's own peak is exact.
"""

import contextlib
import ctypes
import gc
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import psutil
import torch

from emloc.errors import MemoryLimitError
from emloc.machine.memory_limit import is_out_of_memory, limit_memory

_PAGES = Path("/proc/self/statm")
INTERVAL_SECONDS = 0.002


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process now."""
    pages = _pages()
    if pages is None:
        return int(psutil.Process().memory_full_info().uss)
    return (pages[1] - pages[2]) * mmap.PAGESIZE


def _pages() -> list[int] | None:
    """Pages of this process by what /proc says; cheap, since it is asked for hundreds of times a second."""
    try:
        handle = os.open(_PAGES, os.O_RDONLY)
    except OSError:
        return None
    try:
        return [int(number) for number in os.read(handle, 256).split()]
    finally:
        os.close(handle)


def release_free_memory() -> None:
    """Give memory that Python, the C library and torch's pinned pool hold unused back to the system.

    Without it, a stage that runs after another in one process finds its memory already there, and
    its peak would read as nothing. Where the C library has no `malloc_trim`, nothing happens.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    if torch.version.cuda is not None and torch.cuda.is_initialized():
        empty: Callable[[], None] | None = getattr(torch.accelerator, "empty_host_cache", None)
        if empty is not None:  # from torch 2.10 on
            empty()


def resident_bytes() -> int:
    """All resident memory of this process now, mapped files included."""
    pages = _pages()
    return int(psutil.Process().memory_info().rss) if pages is None else pages[1] * mmap.PAGESIZE


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
LARGE_BYTES = 1 << 20
STREAMED_BYTES = 1 << 17

_largest_kept = LARGE_BYTES


def return_large_blocks() -> None:
    """Have the C library give every freed block of a MiB or more back to the system at once.

    By default glibc raises that size to 32 MiB as it sees such blocks freed, and then keeps them in a
    heap that small allocations fragment. A hole of that heap serves large blocks from then on, whatever
    the size is, and nothing gives it back: so a stage says this before it does anything else. The
    heap's free end goes back from 128 KiB on, as by default before glibc sees large blocks.
    Process-wide; other C libraries are left alone.
    """
    _keep_up_to(LARGE_BYTES)
    _set_allocator(_M_TRIM_THRESHOLD, STREAMED_BYTES)


@contextlib.contextmanager
def streaming_memory() -> Iterator[None]:
    """Have freed blocks of 128 KiB or more given back at once inside the block, as well as the heap's end.

    Hidden states of a micro-batch are often smaller than a MiB. In the heap they leave holes, which
    weights then fill and smaller things fragment: a stage that holds one block of weights would grow
    with the model's depth. Fresh pages cost a streamed pass nothing that can be measured; training,
    which goes through them in every step, would take 40 % longer (hidden size 512, two cores), and
    keeps to `return_large_blocks`.
    """
    before = _largest_kept
    return_large_blocks()
    _keep_up_to(STREAMED_BYTES)
    try:
        yield
    finally:
        _keep_up_to(before)


def _keep_up_to(size: int) -> None:
    global _largest_kept
    _largest_kept = size
    _set_allocator(_M_MMAP_THRESHOLD, size)


def _set_allocator(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)


class PeakMemory:
    """Context manager; `peak_bytes` is the most memory seen, less that at its start.

    Args:
        device: on CUDA, `peak_bytes` is the allocator's peak and `host_bytes` this process's.
        mapped: count mapped files as well as anonymous memory.
        limit: the most anonymous memory, or memory of the card, over the start.

    Raises:
        MemoryLimitError: on leaving, where an allocation failed under the limit.
    """

    def __init__(self, device: str = "cpu", mapped: bool = False, limit: int | None = None) -> None:
        self._device, self._limit = device, limit
        self._lift: Callable[[], None] | None = None
        self._measure = resident_bytes if mapped else anonymous_bytes
        self._cuda = device if device.startswith("cuda") else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.start_bytes = 0
        self.host_bytes = 0
        self.peak_bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        release_free_memory()
        self.start_bytes = self._measure()
        self._thread.start()
        if self._limit is not None:
            self._lift = limit_memory(self._device, self._limit)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lift is not None:
            self._lift()
        self._stop.set()
        self._thread.join()
        self._look()
        self.peak_bytes = (
            int(torch.cuda.max_memory_allocated(self._cuda)) if self._cuda else self.host_bytes
        )
        if self._limit is not None and problem is not None and is_out_of_memory(problem):
            raise MemoryLimitError(
                f"It needs more than memory={format_bytes(self._limit)}: it held "
                f"{format_bytes(self.peak_bytes)} when an allocation failed."
            ) from problem

    def figures(self) -> dict[str, int]:
        """`peak_bytes` and `host_peak_bytes`, for a manifest."""
        return {"peak_bytes": self.peak_bytes, "host_peak_bytes": self.host_bytes}

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        self.host_bytes = max(self.host_bytes, self._measure() - self.start_bytes)


def format_bytes(count: int | float) -> str:
    """`1536` as `1.5 KiB`; binary units."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
