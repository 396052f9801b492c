"""Objects that a plugin's entry names as `module:attribute`, imported when they are needed."""

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
        named = getattr(importlib.import_module(module), attribute)
        return named() if isinstance(named, type) else named


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause garbage collection: it would go over and over the lasting objects that importing transformers
    makes, and free nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
