"""A number on every head dimension and neuron that may go, and its gradient.

A mask of an attention has one entry per head dimension (per pair under rotary positions), shared over the
layer's heads and over queries, keys and values; one of an MLP has one per neuron, on the outputs of the
input layer that is not behind the gate. Entries are 1 in the model as it is, and 0 takes a part out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emloc.extend.family import Batch
from emloc.streaming.block_gradients import backward_by_block
from emloc.streaming.stream import UnitStream
from emloc_baselines.structures import Structures


@dataclass
class Masks:
    """The masks of one block; gradients add up until they are cleared.

    Attributes:
        dims: per head dimension, a pair counted once.
        neurons: per neuron.
    """

    structures: Structures
    dims: Tensor
    neurons: Tensor

    @classmethod
    def ones(cls, structures: Structures, like: Tensor) -> "Masks":
        """The block as it is."""
        attention, mlp = structures.attention, structures.mlp
        return cls(
            structures,
            like.new_ones(attention.units).requires_grad_(),
            like.new_ones(mlp.neurons).requires_grad_(),
        )

    def head(self) -> Tensor:
        """The mask of one head's dimensions."""
        return torch.cat([self.dims, self.dims]) if self.structures.attention.paired else self.dims

    def set(self, dims: Tensor, neurons: Tensor) -> None:
        """New values; gradients stay."""
        with torch.no_grad():
            self.dims.copy_(dims)
            self.neurons.copy_(neurons)


@contextmanager
def masked(model: nn.Module, masks: Sequence[Masks]) -> Iterator[None]:
    """The model with masks on, while the context is open."""
    handles: list[Any] = []
    for mask in masks:
        attention, mlp = mask.structures.attention, mask.structures.mlp
        for layer in (attention.query, attention.key, attention.value):
            handles.append(model.get_submodule(layer).register_forward_hook(_on_heads(mask)))
        layer = model.get_submodule(mlp.inputs[-1])
        handles.append(layer.register_forward_hook(_on_neurons(mask)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_heads(mask: Masks) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        head = mask.head().to(output.dtype)
        return output * head.repeat(output.shape[-1] // len(head))

    return hook


def _on_neurons(mask: Masks) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output * mask.neurons.to(output.dtype)

    return hook


def accumulate_gradients(
    stream: UnitStream, batches: Sequence[Batch], masks: Sequence[Masks]
) -> float:
    """Add ∂L/∂mask of the summed loss to all masks' gradients; returns the mean loss.

    Weights are read block by block, forward and back, and get no gradients.
    """

    @contextmanager
    def visit(_: str, __: nn.Module) -> Iterator[None]:
        yield

    with masked(stream.model, masks):
        return backward_by_block(stream, batches, visit, in_parts=True)
