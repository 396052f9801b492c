"""A pass over the base model: fold moments while micro-batches run.

All micro-batches advance in lockstep. At a block its weights are loaded, hooks fold the moments of every
group's side, and when all are through, the block is handed over: to be fitted and written
(`emloc.compression.fitting`), or for its layers' forms to be priced (`emloc.compression.menu_choice`).
Peak memory is one block in float32, its moments, what is done with them, and the hidden states.
"""

import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.sensitivity import BlockProbe
from emloc.errors import ConfigError
from emloc.extend.capabilities import token_mask_of
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, loss_sum
from emloc.linalg.gram import Moments
from emloc.machine.progress import progress_bar
from emloc.streaming.call import Call, current_call
from emloc.streaming.input_rows import input_rows
from emloc.streaming.lockstep import lockstep, refuse_again
from emloc.streaming.real_rows import is_expert, real_rows
from emloc.streaming.stream import UnitStream

SMALL = 0.25
"""A share of the largest block. A module behind the last block that is smaller is run, to see whether
blocks come again, as in models that loop; a head is larger, and too dear to run for that.
"""


@dataclass
class Passed:
    """A block that all micro-batches are through, while its weights are loaded.

    Attributes:
        block: its name.
        moments: by `Group.source`; without tokens for an expert that no token chose, or a layer that the
            forward skips; none for a block that no sample needs.
        probe: has what the block was given.
        started: when its turn came.
    """

    block: str
    moments: dict[str, Moments]
    probe: BlockProbe
    started: float


def stream_moments(
    stream: UnitStream,
    plan: CompressionPlan,
    batches: Sequence[Batch],
    done: Set[str],
    title: str,
    finish: Callable[[Passed], None],
) -> None:
    """Run the micro-batches through the base once, and hand every block's moments to `finish`.

    Blocks that no sample needs are handed over in the end, without any.

    Args:
        plan: its groups' moments are summed.
        done: blocks that are only run.
        title: of the progress bar.

    Raises:
        NumericalError: an activation is NaN; names the layer.
        ConfigError: a block runs more than once in a forward, layers share a weight, or it is not known
            which of the rows that a layer reads are padding.
    """
    refuse_shared(stream, plan)
    blocks, seen = stream.blocks, set[str]()
    if done >= set(blocks):
        return
    calls = [Call(running(stream, batch)) for batch in batches]
    probe = BlockProbe(stream)
    probed = [b for b in blocks if any(group.wide or group.menu for group in plan.within(b))]
    with progress_bar(title, len(blocks)) as advance:

        @contextmanager
        def visit(unit: str) -> Iterator[None]:
            if unit in blocks:
                refuse_again(unit, seen)
                seen.add(unit)
            with stream.filled(unit):
                if unit in blocks and unit not in done:
                    started = time.monotonic()
                    with probe.of(unit):
                        with _folding_block(stream, plan, unit) as moments:
                            yield
                        finish(Passed(unit, moments, probe, started))
                else:
                    yield
            if unit in blocks:
                advance(note=unit)

        def enough(waiting: Set[str | None]) -> bool:
            return seen.issuperset(blocks) and none_comes_again(stream, waiting)

        with probe.watching(probed):
            lockstep(stream.model, stream.units, calls, visit, enough, stream.device)
        for block in blocks:
            if block not in seen | done:  # a tower that no sample needs
                finish(Passed(block, {}, probe, time.monotonic()))
                advance(note=block)


def none_comes_again(stream: UnitStream, waiting: Set[str | None]) -> bool:
    """Return whether calls that are through all blocks need none again, as far as can be seen cheaply.

    Args:
        waiting: the units that they stand before; None: a call has returned.
    """
    if not waiting.isdisjoint(stream.blocks):
        return False
    small = SMALL * max(_numel(stream, block) for block in stream.blocks)
    return len(waiting) > 1 or any(_numel(stream, str(unit)) > small for unit in waiting)


def _numel(stream: UnitStream, unit: str) -> int:
    return sum(p.numel() for p in stream.model.get_submodule(unit).parameters())


def refuse_shared(stream: UnitStream, plan: CompressionPlan) -> None:
    """A weight that several layers have in common reads more than one of them shows."""
    names: dict[int, list[str]] = {}
    for name, module in stream.model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    holders: dict[str, str] = {}
    for layer in (layer for group in plan.groups for layer in group.layers):
        same_module = names[id(stream.model.get_submodule(layer))]
        other = holders.setdefault(stream.weight_name(layer), layer)
        if len(same_module) > 1 or other != layer:
            others = [name for name in (*same_module, other) if name != layer]
            raise ConfigError(
                f"Layers {layer} and {others[0]} share one weight, which cannot be compressed for one of "
                f"them; exclude both."
            )


def running(stream: UnitStream, batch: Batch) -> Callable[[], LossSum]:
    """A call's work: a micro-batch's forward to its loss, with the micro-batch as the call's context."""

    def run() -> LossSum:
        call = current_call()
        assert call is not None
        call.context = {name: tensor.to(stream.device) for name, tensor in batch.items()}
        return loss_sum(stream.family, stream.model, call.context)

    return run


@contextmanager
def _folding_block(
    stream: UnitStream, plan: CompressionPlan, block: str
) -> Iterator[dict[str, Moments]]:
    """Fold the moments of a block's groups while it runs."""
    sources = {group.source: group for group in plan.within(block)}
    moments = {
        name: Moments(group.form.format.side(group.shape), name) for name, group in sources.items()
    }
    handles = [
        stream.model.get_submodule(name).register_forward_hook(
            _folding(stream, block, group, moments[name])
        )
        for name, group in sources.items()
    ]
    handles += [
        handle for group in sources.values() for handle in _watch_shared_input(stream, group)
    ]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _watch_shared_input(stream: UnitStream, group: Group) -> list[Any]:
    """Layers were found to read the same tensor in one forward; they must in these.

    They are called in any order; a round begins with a layer that the last one had already.
    """
    read: dict[str, Tensor] = {}

    def watching(name: str) -> Any:
        def check(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if name in read:
                read.clear()
            other = next(iter(read), None)
            if other and read[other] is not x and not torch.equal(read[other], x):
                raise ConfigError(
                    f"Layers {other} and {name} do not always read the same, so they cannot share a "
                    f"factor; pass share_factors=false."
                )
            read[name] = x
            if len(read) == len(group.layers):
                read.clear()  # so that nothing is held for longer than it is

        return check

    watched = group.layers if len(group.layers) > 1 else ()
    return [
        stream.model.get_submodule(name).register_forward_pre_hook(watching(name))
        for name in watched
    ]


def _folding(stream: UnitStream, block: str, group: Group, moments: Moments) -> Any:
    expert = is_expert(stream.model, block, group.owner)
    convolution = bool(group.shape.kernel)

    def fold(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        call = current_call()
        batch: Batch = {} if call is None else call.context
        mask = token_mask_of(stream.family, batch, group.owner)
        if expert and inputs[0].ndim == 2:  # tokens in an order and number of its own
            mask = None

        def real(values: Tensor) -> Tensor:
            return real_rows(values, mask, f"Layer {group.owner}")

        if moments.side == "input":
            for rows in input_rows(module, inputs[0], output, mask, f"Layer {group.owner}"):
                moments.fold(rows)
        elif len(group.layers) == 1:
            y = real(output.movedim(-3, -1) if convolution else output)
            bias = dict(module.named_parameters()).get("bias")
            moments.fold(y if bias is None else y - bias)
        else:
            x = real(inputs[0])
            moments.fold(torch.cat([x @ weight.T for weight in weights_of(stream, group)], dim=1))

    return fold


def weights_of(stream: UnitStream, group: Group) -> list[Tensor]:
    """The weights of a group's layers, d_out × d_in."""
    return [stream.weight(name) for name in group.layers]
