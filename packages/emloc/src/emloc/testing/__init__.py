"""Means of testing that are shipped, for this package's tests and for those of plugins.

A pretended CUDA device, a toy family that needs torch alone, plugins that are discovered without being
installed, and the contract of every family (`emloc.testing.contract`, which needs pytest). Nothing of it is
imported by the stages.
"""

from emloc.testing.installed import plugin_installed
from emloc.testing.pretend_cuda import pretend_device
from emloc.testing.traffic import Traffic

__all__ = ["Traffic", "plugin_installed", "pretend_device"]
