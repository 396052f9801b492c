"""The weights that a LoRA was trained beside: an emulator's, or the base's own in few bits.

Whatever they are, correction, merging and evaluation ask for a layer's weight by its name.
"""

from collections.abc import Collection
from typing import Protocol

import torch

from emloc.linalg.operator import Operator


class FrozenWeights(Protocol):
    """The weights of the layers that were not the base's as it is stored."""

    @property
    def layers(self) -> Collection[str]:
        """Names of those layers."""
        ...

    @property
    def called(self) -> str:
        """The model that they are of, in messages."""
        ...

    @property
    def changed_by(self) -> str:
        """The cause of their change, in messages: `which …`."""
        ...

    @property
    def exempt(self) -> str:
        """A way to leave a layer as it is, in messages."""
        ...

    def operator(self, layer: str, device: torch.device | None = None) -> Operator:
        """One of the layers' weight, d_out × d_in."""
        ...
