"""Means of testing that are shipped, for this package's tests and for those of plugins.

The contract of every family (`FamilyContract`, which needs pytest), plugins that are discovered without being
installed, a pretended CUDA device, and a toy family that needs torch alone. Each is imported on first use.
Nothing of it is imported by the stages.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emloc.testing.contract import FamilyContract
    from emloc.testing.installed import plugin_installed
    from emloc.testing.pretend_cuda import pretend_device
    from emloc.testing.traffic import Traffic

_MODULES = {
    "FamilyContract": "contract",
    "Traffic": "traffic",
    "plugin_installed": "installed",
    "pretend_device": "pretend_cuda",
}

__all__ = ["FamilyContract", "Traffic", "plugin_installed", "pretend_device"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'emloc.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"emloc.testing.{_MODULES[name]}"), name)
