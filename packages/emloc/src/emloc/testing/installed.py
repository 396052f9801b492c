"""Plugins that are not installed, discovered as if they were."""

import importlib.metadata
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from emloc.extend.plugin_options import forget_plugin_options
from emloc.extend.plugins import GROUP


@contextmanager
def plugin_installed(module: str, name: str | None = None) -> Generator[None]:
    """Have a plugin discovered in this process beside those that are installed, unless it is one of them.

        with plugin_installed("my_package.hooks"):
            emloc.compress(...)

    Args:
        module: as an entry point of the group `emloc` names it; imported when plugins are loaded.
        name: of the entry point; by default the module's.
    """
    added = importlib.metadata.EntryPoint(name or module, module, GROUP)
    real = importlib.metadata.entry_points

    def entry_points(**asked: Any) -> Any:
        installed = real(**asked)
        if asked.get("group") != GROUP or any(each.value == module for each in installed):
            return installed
        return [*installed, added]

    with patch.object(importlib.metadata, "entry_points", entry_points):
        forget_plugin_options()
        try:
            yield
        finally:
            forget_plugin_options()
