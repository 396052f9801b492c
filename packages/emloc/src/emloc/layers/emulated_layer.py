"""The mark of an emulator's layers, by which integrations know them, and abilities that some have."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class EmulatedLayer:
    """Base of the layers of an emulator, beside the dense class that they stand in for.

    Such a layer's tensors come from a checkpoint and are frozen; `weight` is computed from them.
    """


@runtime_checkable
class LosesPart(Protocol):
    """An `EmulatedLayer` that a part of its weight can be taken off."""

    def take_off(self, columns: Tensor, share: float) -> None:
        """Subtract `share · columns columnsᵀ weight`; columns are orthonormal, d_out × r, float32."""
        ...


@runtime_checkable
class FusesLora(Protocol):
    """An `EmulatedLayer` that computes itself and a LoRA at once."""

    def attach_lora(self, lora: Any) -> None:
        """Take a `FusedLora` on this layer; another on the same layer is let go."""
        ...

    def frozen_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that must not be learnt for that."""
        ...

    def product_dtype(self) -> torch.dtype:
        """The dtype that it multiplies in, where autocast does not say."""
        ...

    def forward_with_lora(self, x: Tensor, up: Tensor, scaling: float) -> Tensor:
        """The layer's output and `scaling · x Aᵀ upᵀ`, (..., d_in) to (..., d_out)."""
        ...
