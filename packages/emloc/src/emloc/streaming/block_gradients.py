"""Gradients of a whole model, with one block's weights and gradients in memory at a time.

Forward, all micro-batches go through the model in lockstep (`emloc.streaming.lockstep`), without a graph
inside blocks; what enters each block is kept. Between blocks (residual glue, a projector, the head)
autograd records as usual, from a block's output, made a leaf, to the inputs of the next. Backward, from the
last block that ran to the first, a block's weights are loaded again, it is run once more with a graph on
what entered it, and the gradient of its output becomes those of its weights and of its inputs, which the
glue carries to the leaves before it. This is gradient checkpointing whose checkpoints are blocks and whose
weights come from disk.

Memory: one block with its gradients, and per micro-batch the inputs of every block and the glue's graph.

Products of a bfloat16 checkpoint are in bfloat16, as in training; gradients of weights and masks add up in
float32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from emloc.errors import NumericalError
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, summed
from emloc.linalg.finite import is_finite
from emloc.machine.progress import progress_bar
from emloc.streaming.lockstep import Call, current_call, lockstep, refuse_again
from emloc.streaming.stream import UnitStream

Visit = Callable[[str, nn.Module], AbstractContextManager[None]]
"""Entered with a block's weights loaded, left when all micro-batches went back through it."""


@dataclass
class _Passage:
    """One micro-batch on its way: what entered every block, and the leaves that left it."""

    entered: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, tuple[Any, Any]])
    left: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])


def backward_by_block(stream: UnitStream, batches: Sequence[Batch], visit: Visit) -> float:
    """Back-propagate the summed loss of all labelled tokens; returns their mean loss.

    Gradients are of the sum over all micro-batches. `visit(block, module)` decides what gets one, by
    `requires_grad_` when entered, and reads `.grad` when left; whatever else requires a gradient inside
    a block, such as a mask in a hook, gets its own.

    Raises:
        DataError: no token has a label.
        NumericalError: the loss or a gradient is NaN or infinite; names the block.
        ConfigError: a block runs more than once in a forward.
    """
    passages = [_Passage() for _ in batches]
    with _precision(stream):
        mean = summed(_forward(stream, batches, passages)).mean("The calibration samples")
        _backward(stream, passages, visit)
    return mean


def _precision(stream: UnitStream) -> AbstractContextManager[Any]:
    """Autocast for a checkpoint in bfloat16. Nothing is cached: a block's weights come and go."""
    floating = [i.dtype for i in stream.checkpoint.tensors.values() if i.dtype.is_floating_point]
    return torch.autocast(
        stream.device.type,
        torch.bfloat16,
        enabled=all(dtype == torch.bfloat16 for dtype in floating),
        cache_enabled=False,
    )


def _backward(stream: UnitStream, passages: Sequence[_Passage], visit: Visit) -> None:
    # As the forward came by them, which need not be as they are listed; the others have no gradient.
    reached = list(dict.fromkeys(block for passage in passages for block in passage.entered))
    others = [block for block in stream.blocks if block not in reached]
    with progress_bar("gradients", len(stream.blocks)) as advance:
        for block in [*reversed(reached), *others]:
            module = stream.model.get_submodule(block)
            with stream.filled(block), torch.enable_grad(), visit(block, module):
                for passage in passages:
                    _back_through(module, block, passage)
            advance(note=block)


def _forward(
    stream: UnitStream, batches: Sequence[Batch], passages: Sequence[_Passage]
) -> list[LossSum]:
    """Run all micro-batches to their loss, and its gradient to the last leaves."""

    def run(batch: Batch) -> LossSum:
        here = {name: tensor.to(stream.device) for name, tensor in batch.items()}
        loss, terms = stream.family.loss(stream.model, here)
        if loss.requires_grad:
            loss.backward()
        return LossSum(float(loss.detach()), terms)

    calls = [
        Call(partial(run, batch), context=passage) for batch, passage in zip(batches, passages)
    ]
    with _hooks(stream), _stray_units(stream) as visit:
        return lockstep(stream.model, stream.units, calls, visit, device=stream.device)


@contextmanager
def _stray_units(stream: UnitStream) -> Iterator[Callable[[str], AbstractContextManager[None]]]:
    with progress_bar("forward", len(stream.units)) as advance:

        @contextmanager
        def visit(unit: str) -> Iterator[None]:
            with stream.filled(unit):
                yield
            advance(note=unit)

        yield visit


@contextmanager
def _hooks(stream: UnitStream) -> Iterator[None]:
    """Record what enters blocks; a graph outside of them only, and leaves where they end."""

    def enter(block: str) -> Any:
        def before(_: nn.Module, inputs: Any, named: Any) -> None:
            refuse_again(block, _passage().entered)
            _passage().entered[block] = (inputs, named)
            torch.set_grad_enabled(False)

        return before

    def leave(block: str) -> Any:
        def after(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
            torch.set_grad_enabled(True)
            parts, form = tree_flatten(output)
            leaves = [_as_leaf(part) for part in parts]
            _passage().left[block] = [part for part in leaves if _is_float(part)]
            return tree_unflatten(leaves, form)

        return after

    before = torch.is_grad_enabled()
    handles: list[Any] = []
    for block in stream.blocks:
        module = stream.model.get_submodule(block)
        handles.append(module.register_forward_pre_hook(enter(block), with_kwargs=True))
        handles.append(module.register_forward_hook(leave(block), with_kwargs=True))
    try:
        yield
    finally:
        torch.set_grad_enabled(before)
        for handle in handles:
            handle.remove()


def _passage() -> _Passage:
    call = current_call()
    assert call is not None
    return cast(_Passage, call.context)


def _is_float(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def _as_leaf(part: Any) -> Any:
    return part.detach().requires_grad_() if _is_float(part) else part


def _back_through(module: nn.Module, block: str, passage: _Passage) -> None:
    """Once more forward with a graph, then back; gradients of the inputs go on through the glue."""
    if block not in passage.entered:  # an image tower that this micro-batch did not need
        return
    entered, leaves = passage.entered.pop(block), passage.left.pop(block)
    gradients = [leaf.grad for leaf in leaves]
    if all(gradient is None for gradient in gradients):
        return
    if not all(gradient is None or is_finite(gradient) for gradient in gradients):
        raise NumericalError(
            f"The gradient of what block {block} writes holds NaN or infinity on the calibration data; "
            f"check the base model's weights (emloc verify)."
        )
    parts, form = tree_flatten(entered)
    # A block that stands before all others reads nothing that has a graph, and needs one all the same
    # if something inside requires a gradient; autograd sees to that.
    fresh = [
        part.detach().requires_grad_() if _is_float(part) and part.requires_grad else part
        for part in parts
    ]
    inputs, named = tree_unflatten(fresh, form)
    output = module(*inputs, **named)
    outputs = [part for part in tree_flatten(output)[0] if _is_float(part)]
    torch.autograd.backward(
        [part for part, g in zip(outputs, gradients) if g is not None and part.requires_grad],
        [g for part, g in zip(outputs, gradients) if g is not None and part.requires_grad],
    )
    glued = [
        (part, new.grad)
        for part, new in zip(parts, fresh)
        if new is not part and new.grad is not None
    ]
    if glued:
        # Kept: what one block read may have been read by others as well.
        torch.autograd.backward(
            [part for part, _ in glued], [gradient for _, gradient in glued], retain_graph=True
        )
