"""Count what a real training step keeps alive, by running it on fake tensors.

Nothing is computed: under torch's `FakeTensorMode` operations make tensors of the right size and no
content, and `LiveBytes` counts them. It needs no formula, so it serves every architecture, and checks the
formulas that there are. The same count on real tensors is the measurement that both are held to.

A deep model is not traced in full. Each of its stacks of equal blocks is cut to two, and once more to
three: what is alive at the largest instant of a phase is linear in the number of blocks (`tape`).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from emloc.extend.family import Batch
from emloc.planning.family import LossOf
from emloc.planning.live import SAVED, LiveBytes, Peak
from emloc.planning.step import Instant, Passing, StepSizes

WEIGHTS, LORA, GRADIENTS, BATCH = "weights", "LoRA", "gradients", "batch"


def count_step(model: nn.Module, batch: Batch, loss_of: LossOf, autocast: bool) -> StepSizes:
    """Run one step, forward and backward, and count; on fake tensors or on real ones.

    Args:
        model: in training mode, with parameters that want gradients.
        autocast: run the forward in bfloat16.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    with LiveBytes() as live:
        live.mark([p for p in model.parameters() if not p.requires_grad], WEIGHTS)
        live.mark(model.buffers(), WEIGHTS)
        live.mark(trained, LORA)
        live.mark(batch.values(), BATCH)

        def has_gradient(parameter: Tensor) -> None:
            live.mark([cast(Tensor, parameter.grad)], GRADIENTS)

        handles = [p.register_post_accumulate_grad_hook(has_gradient) for p in trained]
        device = next(iter(batch.values())).device.type
        mixed = torch.autocast(device, torch.bfloat16) if autocast else contextlib.nullcontext()
        with live.phase("forward"), live.saving(), mixed:
            total, terms = loss_of(model, batch)
            loss = total / terms
        with live.phase("backward"):
            loss.backward()
        for handle in handles:
            handle.remove()
    phases = {name: _instant(peak.kinds) for name, peak in live.phases.items()}
    return StepSizes(phases)


def _instant(kinds: Mapping[str, int]) -> Instant:
    others = {WEIGHTS, LORA, GRADIENTS, SAVED}
    working = sum(count for kind, count in kinds.items() if kind not in others)
    return Instant(kept=kinds.get(SAVED, 0), working=working)


def trace_step(model: nn.Module, batch: Batch, loss_of: LossOf, autocast: bool) -> StepSizes:
    """`count_step` on fake tensors; what `model` holds on the meta device becomes fake."""
    with FakeTensorMode(allow_non_fake_inputs=True), Answers():
        materialise(model)
        fake = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in batch.items()}
        return count_step(model, fake, loss_of, autocast)


class _Reached(Exception):
    """All blocks are done."""


def trace_forward(
    model: nn.Module,
    blocks: Sequence[str],
    batch: Batch,
    run: Callable[[nn.Module, Batch], Any],
    watched: Mapping[str, int],
) -> StepSizes:
    """A forward through the blocks without gradients, on fake tensors; what follows them is left out.

    Args:
        watched: elements per row that a hook on a layer makes and lets go of.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Answers(), torch.no_grad():
        materialise(model)
        fake = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in batch.items()}
        with LiveBytes() as live:
            live.mark([*model.parameters(), *model.buffers()], WEIGHTS)
            weights, passings = live.now, list[Passing]()
            before: list[int] = []
            left: list[Passing] = []
            to_come = set(blocks)

            def passing() -> Passing:
                totals = (before[-1], live.peak.total, live.now)
                return Passing(*(count - weights for count in totals))

            def reach(*_: object) -> None:
                if before:
                    passings.append(passing())
                live.peak = Peak(live.now)
                before.append(live.now)

            def leave(name: str) -> Callable[..., None]:
                def leaving(*_: object) -> None:
                    left[:] = [passing()]
                    to_come.discard(name)
                    if not to_come:
                        raise _Reached

                return leaving

            for name in blocks:
                model.get_submodule(name).register_forward_pre_hook(reach)
            for name, elements in watched.items():
                model.get_submodule(name).register_forward_hook(_watching(elements))
            for name in blocks:  # whichever is the last to run
                model.get_submodule(name).register_forward_hook(leave(name))
            with contextlib.suppress(_Reached):
                run(model, fake)
            passings += left
    return StepSizes(blocks={None: passings})


def _watching(elements: int) -> Callable[..., None]:
    def watch(module: nn.Module, _: object, output: Tensor) -> None:
        pixels = isinstance(module, nn.Conv2d)
        rows = output.numel() // output.shape[-3 if pixels else -1]
        output.new_empty(rows, elements)

    return watch


class Answers(TorchDispatchMode):
    """Says yes where a forward asks for a value: models check what they are given."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def materialise(model: nn.Module) -> None:
    """Give what lies on the meta device memory, of no particular content; fake within a fake mode."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        held = module._parameters  # pyright: ignore[reportPrivateUsage]
        for name, parameter in held.items():
            if parameter is not None:
                if id(parameter) not in known:  # tied ones stay tied
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                    known[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
                held[name] = known[id(parameter)]
        buffers = module._buffers  # pyright: ignore[reportPrivateUsage]
        for name, buffer in buffers.items():
            if buffer is not None:
                buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@dataclass(frozen=True)
class Depths:
    """The number of blocks in each stack of a model, and a way to count a step of a shallower one."""

    blocks: Sequence[int]
    count: Callable[[Sequence[int]], StepSizes]


SHALLOW = 2
"""Blocks of a shallow model's stacks: the first block may differ from the others, as its input needs no
gradient."""


def extrapolate(depths: Depths) -> StepSizes:
    """A step of the whole model, by what one block more of each stack adds; one no deeper is counted."""
    if all(count <= SHALLOW + 1 for count in depths.blocks):
        return depths.count(depths.blocks)
    start = [min(SHALLOW, count) for count in depths.blocks]
    base = depths.count(start)
    phases = {name: _numbers(instant) for name, instant in base.phases.items()}
    for index, blocks in enumerate(depths.blocks):
        if blocks <= SHALLOW:
            continue
        deeper = [n + (i == index) for i, n in enumerate(start)]
        more = depths.count(deeper)
        times = blocks - SHALLOW
        for name, instant in more.phases.items():
            for part, value in _numbers(instant).items():
                phases[name][part] += times * (value - _numbers(base.phases[name])[part])
    return StepSizes({name: Instant(**parts) for name, parts in phases.items()})


def _numbers(instant: Instant) -> dict[str, int]:
    return {"kept": instant.kept, "loss": instant.loss, "working": instant.working}
