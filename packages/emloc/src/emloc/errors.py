"""Exceptions that say what went wrong, where, and what to do next.

Every error is an `EmlocError` and also the standard type that a caller would expect; the command
line prints the message as one sentence and exits with the error's `exit_code`.
"""


class EmlocError(Exception):
    """Base of all errors that EmLoC raises on purpose."""

    exit_code = 1


class ConfigError(EmlocError, ValueError):
    """An option or YAML key is unknown, missing or out of range."""

    exit_code = 2


class DataError(EmlocError, ValueError):
    """A data set is missing, empty, malformed or leaves nothing to learn from."""

    exit_code = 3


class CheckpointError(EmlocError, ValueError):
    """A checkpoint on disk is missing, incomplete or corrupt."""

    exit_code = 4


class MismatchError(EmlocError, ValueError):
    """Two artefacts do not belong together: adapter and base, emulator and base, keys and weights."""

    exit_code = 5


class NumericalError(EmlocError, ArithmeticError):
    """NaN or infinity in weights, activations or gradients."""

    exit_code = 6


class OutputError(EmlocError, OSError):
    """The output cannot be written: it exists, the disk is full, permission is missing."""

    exit_code = 7


class PluginError(EmlocError, RuntimeError):
    """A plugin is missing, broken, or claims a name that is taken."""

    exit_code = 8


class DependencyError(EmlocError, ImportError):
    """An optional package is needed and not installed."""

    exit_code = 9


class MemoryLimitError(EmlocError, MemoryError):
    """A stage does not fit in the memory or on the disk that it may take, or did not keep to it."""

    exit_code = 10


class UnexpectedError(EmlocError, RuntimeError):
    """A failure that nobody foresaw; `__cause__` is the exception that it was."""


class Interrupted(EmlocError):
    """Ctrl-C; the exit code is 128 + SIGINT, as shells expect."""

    exit_code = 130
