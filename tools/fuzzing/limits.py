"""At most so many seconds and so much memory for one input."""

import ctypes
import ctypes.util
import faulthandler
import resource
import signal
from contextlib import contextmanager

SECONDS = 2.0
"""Seconds of the processor's time, so that a busy machine fails nobody."""

BYTES = 512 << 20
STUCK = 20
"""Seconds after which the process ends: something hangs outside of Python, where no signal gets through."""


class TooLong(BaseException):
    """An input took more than its time; no `except Exception` holds it back."""


class TooMuch(BaseException):
    """An input took more than its memory."""


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _peak():
    """The most that was resident since it was last reset."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) << 10
    return 0


def _reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


_libc = ctypes.CDLL(ctypes.util.find_library("c"))


def release():
    """Give freed memory back, so that one input's does not count as the next one's."""
    _libc.malloc_trim(0)


def _expired(*_):
    raise TooLong(f"an input took more than {SECONDS:g} s")


@contextmanager
def limited():
    """Run the body within the limits.

    Raises:
        TooLong, TooMuch: it did not keep to them.
    """
    before = _resident()
    _reset_peak()
    handler = signal.signal(signal.SIGPROF, _expired)
    faulthandler.dump_traceback_later(STUCK, exit=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGPROF, handler)
    taken = _peak() - before
    if taken > BYTES:
        release()
        raise TooMuch(f"an input took {taken >> 20} MiB")
