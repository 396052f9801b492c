"""Autocast as something to take down and to put back, where calls and passes take turns in one thread."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

KINDS = ("cpu", "cuda")


@dataclass(frozen=True)
class Autocast:
    """The settings of autocast, by kind of device.

    Attributes:
        kinds: whether it is on, and its dtype.
        cached: whether casts of weights are kept.
    """

    kinds: tuple[tuple[bool, torch.dtype], ...]
    cached: bool

    @classmethod
    def now(cls) -> "Autocast":
        """Take down the present state."""
        kinds = [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in KINDS]
        return cls(tuple(kinds), torch.is_autocast_cache_enabled())

    def set(self) -> None:
        """Let it be the state from now on."""
        for kind, (enabled, dtype) in zip(KINDS, self.kinds):
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.cached)

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same state inside, and afterwards the one of before.

        Casts are not kept: only leaving `torch.autocast` lets go of them, and the next step would compute
        with the weights of this one.
        """
        before = Autocast.now()
        self.set()
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            before.set()
