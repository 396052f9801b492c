"""The loss's need of a structure: LLM-Pruner's first-order criterion.

`I(S) = Σ_{w ∈ S} |w · ∂L/∂w|` over all weights of a coupled structure S: of a key-value head with its
query heads, of a neuron; L is the loss summed over the calibration micro-batches before the product is
taken. (Ma et al. 2023, arXiv 2305.11627: `param_first` with grouping `sum`, as LoRAM prunes.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emloc.extend.family import Batch
from emloc.streaming.block_gradients import backward_by_block
from emloc.streaming.stream import UnitStream
from emloc_baselines.structures import Structures


class Importance(NamedTuple):
    """Scores of the structures of one block.

    Attributes:
        groups: one number per key-value head.
        neurons: one per neuron.
    """

    groups: Tensor
    neurons: Tensor


def first_order(
    stream: UnitStream, batches: Sequence[Batch], structures: Sequence[Structures]
) -> dict[str, Importance]:
    """The importance of all structures by block, in one pass forward and one back."""
    wanted = {structures_here.block: structures_here for structures_here in structures}
    scores: dict[str, Importance] = {}

    @contextmanager
    def visit(block: str, module: nn.Module) -> Iterator[None]:
        structures_here = wanted.get(block)
        layers = [] if structures_here is None else _layers(structures_here)
        parts = [p for layer in layers for p in stream.model.get_submodule(layer).parameters()]
        for parameter in parts:
            parameter.requires_grad_(True)
        yield
        if structures_here is not None:
            scores[block] = _scores(stream.model, structures_here)
        for parameter in parts:
            parameter.grad = None

    backward_by_block(stream, batches, visit)
    return scores


def _layers(here: Structures) -> list[str]:
    attention, mlp = here.attention, here.mlp
    return [
        attention.query, attention.key, attention.value, attention.output, *mlp.inputs, mlp.output,
    ]  # fmt: skip


def _scores(model: nn.Module, here: Structures) -> Importance:
    attention, mlp = here.attention, here.mlp
    queries = _rows(model, attention.query) + _columns(model, attention.output)
    keys = _rows(model, attention.key) + _rows(model, attention.value)
    groups = queries.reshape(attention.groups, -1).sum(1) + keys.reshape(attention.groups, -1).sum(
        1
    )
    neurons = _columns(model, mlp.output) + sum(_rows(model, name) for name in mlp.inputs)
    return Importance(groups, neurons)


def _product(parameter: Any) -> Tensor:
    if parameter.grad is None:  # no micro-batch came by
        return torch.zeros_like(parameter)
    return (parameter * parameter.grad).detach().abs()


def _rows(model: nn.Module, layer: str) -> Tensor:
    """Per output: its weights' and its bias' products."""
    module: Any = model.get_submodule(layer)
    total = _product(module.weight).sum(1)
    return total if module.bias is None else total + _product(module.bias)


def _columns(model: nn.Module, layer: str) -> Tensor:
    """Per input."""
    module: Any = model.get_submodule(layer)
    return _product(module.weight).sum(0)
