"""Means of testing that are shipped: a pretend CUDA device, for this package's tests and for plugins'."""

from emloc.testing.pretend_cuda import pretend_device
from emloc.testing.traffic import Traffic

__all__ = ["Traffic", "pretend_device"]
