"""Faults in a process that runs a stage: a signal or an error of the disk, at one of its steps.

A step is anything below a folder that changes what is on the disk and that Python is asked about: a file
opened for writing, a rename, a removal, a new folder, a sync. Libraries in other languages write between such
steps.
"""

import builtins
import errno
import io
import os
import resource
import signal
import sys

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
REMOVALS = {"os.remove", "os.rmdir"}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
TORN, LIMIT = "EIO in the middle of a file", "a limit on the size of files"
KINDS = (*SIGNALS, *ERRORS, TORN, LIMIT)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Steps:
    """Counts the steps of this process below a folder, and does something at one of them."""

    def __init__(self, root):
        self.root, self.count, self.at, self.act = str(root), 0, None, lambda event: None
        self._sync = os.fsync
        os.fsync = self._fsync
        sys.addaudithook(self._hook)  # stays for as long as the process

    def _hook(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            changes = isinstance(flags, int) and flags & _WRITING
        else:
            path, changes = (arguments[0] if arguments else None), event in CHANGES
        if changes and isinstance(path, (str, os.PathLike)) and self._is_below(os.fspath(path)):
            self._step(event)

    def _is_below(self, path):
        return str(path).startswith(self.root)

    def _fsync(self, handle):
        self._step("fsync")
        self._sync(handle)

    def _step(self, event):
        self.count += 1
        if self.count == self.at:
            self.act(event)


def install(kind, root, at):
    """Have the fault come at a step; returns the steps."""
    steps = Steps(root)
    steps.at = at
    if kind in SIGNALS:
        # As in a terminal, even where the attacks run in the background, which ignores Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        steps.act = lambda event: os.kill(os.getpid(), SIGNALS[kind])
    elif kind in ERRORS:

        def fail(event):
            # What is removed on the way out may stay, and is not what is looked at here.
            if event in REMOVALS:
                steps.at += 1
                return
            raise OSError(ERRORS[kind], os.strerror(ERRORS[kind]))

        steps.act = fail
    elif kind == TORN:
        _tear(steps, at)
    elif kind == LIMIT:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (at * 997 % 60_000, most))
    return steps


class Torn:
    """A file of which half of a write arrives, and then the disk fails."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        """Half of it."""
        self._file.write(data[: len(data) // 2])
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def _tear(steps, at):
    """The n-th file below the folder that is opened for writing is torn."""
    real, opened = io.open, [0]

    def open_file(file, mode="r", *arguments, **options):
        handle = real(file, mode, *arguments, **options)
        below = isinstance(file, (str, os.PathLike)) and str(os.fspath(file)).startswith(steps.root)
        if below and set(mode) & set("wax+"):
            opened[0] += 1
            if opened[0] == 1 + at % 7:
                return Torn(handle)
        return handle

    io.open = builtins.open = open_file
