"""Gradients of a whole model, with one block's weights and gradients in memory at a time.

Forward, all micro-batches go through the model in lockstep (`emloc.streaming.lockstep`), without a graph
inside blocks; what enters each block is kept. Between blocks (residual glue, a projector, the head)
autograd records as usual, from a block's output, where it lands, to the inputs of the next. Backward, from
the last block that ran to the first, a block's weights are loaded again, it is run once more with a graph
on what entered it, and the gradient of its output becomes those of its weights and of its inputs, which the
glue carries to where they landed before. This is gradient checkpointing whose checkpoints are blocks and
whose weights come from disk. Dropout draws the same numbers both times, and products have the same precision.

Memory: one block with its gradients, and per micro-batch the inputs of every block, where `KeptInputs` keeps
them, and the glue's graph.

Products of a bfloat16 checkpoint are in bfloat16, as in training; gradients of weights and masks add up in
float32.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_flatten, tree_unflatten

from emloc.errors import ConfigError, NumericalError
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, summed
from emloc.linalg.finite import is_finite
from emloc.machine.progress import progress_bar
from emloc.streaming.call import Call, current_call
from emloc.streaming.kept_inputs import InMemory, KeptInputs, Random
from emloc.streaming.lockstep import lockstep
from emloc.streaming.precision import Autocast
from emloc.streaming.stream import UnitStream

Visit = Callable[[str, nn.Module], AbstractContextManager[None]]
"""Entered with a block's weights loaded, left when all micro-batches went back through it.

Runs of a block that follow each other share a visit.
"""


Fill = Callable[[str, str | None], AbstractContextManager[None]]
"""Hold a unit's weights; the second name is the unit that is needed next, as far as is known."""

Made = TypeVar("Made")


class _Landed:
    """A place where a block's output went on, and the gradient that comes back to it."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Add to what came back before."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class _Landing(torch.autograd.Function):
    """A block's output to those who read it; its node in the graph does not hold the numbers."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, landed: _Landed) -> Tensor:
        """The value; `anchor` requires a gradient, so that the graph begins here."""
        ctx.landed = landed
        return value.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep the gradient."""
        ctx.landed.add(gradient)
        return None, None, None


_LANDED = f"{_Landing.__name__}Backward"
"""The name of the node in a graph that is the output of a block."""


@dataclass
class _Entered:
    """All that entered a block: tensors as they are kept, and the places in the graph that they came from."""

    parts: list[Any]
    edges: list[GradientEdge | None]
    form: Any
    random: Random | None
    autocast: Autocast


class _Run(NamedTuple):
    """A run of a block in a forward; most blocks have one."""

    block: str
    number: int


@dataclass
class _Passage:
    """One micro-batch on its way: what entered every block, and where what left it went on."""

    runs: Counter[str] = field(default_factory=Counter[str])
    entered: dict[_Run, _Entered] = field(default_factory=dict[_Run, _Entered])
    left: dict[_Run, list[_Landed]] = field(default_factory=dict[_Run, list[_Landed]])


def backward_by_block(
    stream: UnitStream,
    batches: Sequence[Batch],
    visit: Visit,
    kept: KeptInputs | None = None,
    in_parts: bool = False,
) -> float:
    """Back-propagate the summed loss of all labelled tokens; returns their mean loss.

    Gradients are of the sum over all micro-batches. `visit(block, module)` decides what gets one, by
    `requires_grad_` when entered, and reads `.grad` when left; whatever else requires a gradient inside
    a block, such as a mask in a hook, gets its own.

    Args:
        kept: where what enters blocks is kept in between; by default in memory.
        in_parts: whether `visit` adds up by itself what a block gets in several visits, as where a model
            goes through all of its blocks again.

    Raises:
        DataError: no token has a label.
        NumericalError: the loss or a gradient is NaN or infinite; names the block.
        ConfigError: a block runs again after others, and `visit` takes it for all of its gradients.
    """

    def loss_of(batch: Batch) -> tuple[Tensor, LossSum]:
        here = {name: tensor.to(stream.device) for name, tensor in batch.items()}
        loss, terms = stream.family.loss(stream.model, here)
        return loss, LossSum(float(loss.detach()), terms)

    def fill(unit: str, following: str | None) -> AbstractContextManager[None]:
        return stream.filled(unit)

    passes = BlockPasses(stream, fill, kept or InMemory(stream.device))
    with _precision(stream):
        parts = passes.forward([partial(loss_of, batch) for batch in batches])
        mean = summed(parts).mean("The calibration samples")
        passes.backward(visit, in_parts)
    return mean


class BlockPasses:
    """The two passes through the blocks that several losses need, one per micro-batch.

    Args:
        fill: by which units get their weights: every one once in the forward, blocks once more.
        kept: where the inputs of blocks are kept in between.
        shown: whether the passes have bars of progress.
    """

    def __init__(
        self, stream: UnitStream, fill: Fill, kept: KeptInputs, shown: bool = True
    ) -> None:
        self._stream, self._fill, self._kept, self._shown = stream, fill, kept, shown
        self._passages: list[_Passage] = []

    def forward(self, losses: Sequence[Callable[[], tuple[Tensor, Made]]]) -> list[Made]:
        """Run all micro-batches to their loss, and its gradient to where the last outputs landed.

        Args:
            losses: each runs the model once; returns a scalar loss, and what is to be known of it.
        """

        def run(loss_of: Callable[[], tuple[Tensor, Made]]) -> Made:
            torch.set_grad_enabled(True)
            loss, made = loss_of()
            if loss.requires_grad:
                loss.backward(retain_graph=_is_shared(_passage()))
            return made

        stream = self._stream
        self._passages = [_Passage() for _ in losses]
        calls = [
            Call(partial(run, one), context=passage) for one, passage in zip(losses, self._passages)
        ]
        following = dict(zip(stream.blocks, stream.blocks[1:]))
        with self._progress("forward", len(stream.units)) as advance:

            @contextmanager
            def visit(unit: str) -> Iterator[None]:
                with self._fill(unit, following.get(unit)):
                    yield
                advance(note=unit)

            with _hooks(stream, self._kept):
                return lockstep(stream.model, stream.units, calls, visit, device=stream.device)

    def backward(self, visit: Visit, in_parts: bool) -> None:
        """Add the gradients of all losses; see `backward_by_block`.

        Raises:
            NumericalError: the gradient of a block's output is NaN or infinite; names the block.
            ConfigError: a block runs again after others, and not `in_parts`.
        """
        stream, passages = self._stream, self._passages
        # As the forward came by them, which need not be as they are listed; others have no gradient.
        runs = list(dict.fromkeys(run for passage in passages for run in passage.entered))
        reached = [list(each) for _, each in groupby(reversed(runs), lambda run: run.block)]
        order = [each[0].block for each in reached]
        again = next((block for block, times in Counter(order).items() if times > 1), None)
        if again is not None and not in_parts:
            raise ConfigError(
                f"Block {again} runs again after others in a forward pass of this model, so its gradients "
                f"come in parts, each of which this method would take for the whole; choose another method."
            )
        others = [block for block in stream.blocks if block not in order]
        order, visits = [*order, *others], [*reached, *([] for _ in others)]
        with self._progress("gradients", len(order)) as advance:
            for block, each, following in zip(order, visits, [*order[1:], None]):
                module = stream.model.get_submodule(block)
                with self._fill(block, following), torch.enable_grad(), visit(block, module):
                    for run in each:
                        for passage in passages:
                            _back_through(module, run, passage, self._kept)
                advance(note=block)
        self._kept.forget()
        self._passages = []

    def _progress(self, title: str, count: int) -> AbstractContextManager[Callable[..., None]]:
        return progress_bar(title, count) if self._shown else nullcontext(_unseen)


def _unseen(note: str = "") -> None:
    pass


def _precision(stream: UnitStream) -> AbstractContextManager[Any]:
    """Autocast for a checkpoint in bfloat16. Nothing is cached: a block's weights come and go."""
    floating = [i.dtype for i in stream.checkpoint.tensors.values() if i.dtype.is_floating_point]
    return torch.autocast(
        stream.device.type,
        torch.bfloat16,
        enabled=all(dtype == torch.bfloat16 for dtype in floating),
        cache_enabled=False,
    )


@contextmanager
def _hooks(stream: UnitStream, kept: KeptInputs) -> Iterator[None]:
    """Record what enters blocks; a graph outside of them only, which begins where they end."""
    anchor = torch.zeros((), device=stream.device, requires_grad=True)

    def enter(block: str) -> Any:
        def before(module: nn.Module, inputs: Any, named: Any) -> None:
            passage = _passage()
            run = _Run(block, passage.runs[block])
            passage.runs[block] += 1
            if not torch.is_grad_enabled():  # by the model itself, which stops gradients here
                return
            parts, form = tree_flatten((inputs, named))
            edges = [_edge(part) for part in parts]
            held = [part if edge is None else kept.put(part) for part, edge in zip(parts, edges)]
            random = Random.now(stream.device) if module.training else None
            passage.entered[run] = _Entered(held, edges, form, random, Autocast.now())
            torch.set_grad_enabled(False)

        return before

    def leave(block: str) -> Any:
        def after(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
            passage = _passage()
            run = _Run(block, passage.runs[block] - 1)
            if run not in passage.entered:
                return output
            torch.set_grad_enabled(True)
            parts, form = tree_flatten(output)
            landed = [_Landed() if _is_float(part) else None for part in parts]
            passage.left[run] = [place for place in landed if place is not None]
            gone = [
                part if place is None else _Landing.apply(part, anchor, place)
                for part, place in zip(parts, landed)
            ]
            return tree_unflatten(gone, form)

        return after

    before = torch.is_grad_enabled()
    handles: list[Any] = []
    for block in stream.blocks:
        module = stream.model.get_submodule(block)
        handles.append(module.register_forward_pre_hook(enter(block), with_kwargs=True))
        # Before hooks that stay, by which transformers takes hidden states of blocks in the middle.
        handles.append(module.register_forward_hook(leave(block), with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        torch.set_grad_enabled(before)
        for handle in handles:
            handle.remove()


def _is_shared(passage: _Passage) -> bool:
    """Return whether blocks read what was made with a graph outside of them, such as one modulation for all.

    What follows the last block may have read it too, and must then leave its graph to them. A graph that
    only goes from block to block is let go of at once.
    """
    edges = (edge for entered in passage.entered.values() for edge in entered.edges)
    return any(edge is not None and edge.node.name() != _LANDED for edge in edges)


def _passage() -> _Passage:
    call = current_call()
    assert call is not None
    return cast(_Passage, call.context)


def _is_float(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def _edge(part: Any) -> GradientEdge | None:
    return get_gradient_edge(part) if _is_float(part) and part.requires_grad else None


def _back_through(module: nn.Module, run: _Run, passage: _Passage, kept: KeptInputs) -> None:
    """Once more forward with a graph, then back; gradients of the inputs go on through the glue."""
    if run not in passage.entered:  # an image tower that this micro-batch did not need
        return
    entered, landed = passage.entered.pop(run), passage.left.pop(run)
    gradients = [place.gradient for place in landed]
    if all(gradient is None for gradient in gradients):
        return
    if not all(gradient is None or is_finite(gradient) for gradient in gradients):
        raise NumericalError(
            f"The gradient of the output of block {run.block} holds NaN or infinity; check the base model's "
            f"weights (emloc verify), and in training use a lower learning_rate."
        )
    # A block that stands before all others reads nothing that has a graph, and needs one all the same
    # if something inside requires a gradient; autograd sees to that.
    fresh = [
        part if edge is None else kept.get(part).requires_grad_()
        for part, edge in zip(entered.parts, entered.edges)
    ]
    inputs, named = tree_unflatten(fresh, entered.form)
    random = nullcontext() if entered.random is None else entered.random.again()
    with entered.autocast.again(), random:
        output = module(*inputs, **named)
    outputs = [part for part in tree_flatten(output)[0] if _is_float(part)]
    torch.autograd.backward(
        [part for part, g in zip(outputs, gradients) if g is not None and part.requires_grad],
        [g for part, g in zip(outputs, gradients) if g is not None and part.requires_grad],
    )
    glued = [
        (edge, new.grad)
        for edge, new in zip(entered.edges, fresh)
        if edge is not None and new.grad is not None
    ]
    if glued:
        # Kept: what one block read may have been read by others as well.
        torch.autograd.backward(
            [edge for edge, _ in glued], [gradient for _, gradient in glued], retain_graph=True
        )
