"""What a plugin's entry points at, `module:attribute`, imported when it is needed."""

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def imported(target: str) -> Any:
    """The object that a target names; of a class, an instance.

    Args:
        target: `module:attribute`.

    Raises:
        ImportError, AttributeError: there is none.
    """
    module, _, attribute = target.partition(":")
    with _collector_paused():
        found = getattr(importlib.import_module(module), attribute)
        return found() if isinstance(found, type) else found


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile: it would go over and over the lasting objects that importing
    transformers makes, and free nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
