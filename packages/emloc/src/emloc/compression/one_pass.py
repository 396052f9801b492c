"""A pass over the base model: fold moments while micro-batches run.

All micro-batches advance in lockstep. At a block its weights are loaded, hooks fold the moments of every
group's side, and when all are through, the block is handed over: to be fitted and written
(`emloc.compression.fitting`), or for its layers' forms to be priced (`emloc.compression.menu_choice`).
Peak memory is one block in float32, its moments, what is done with them, and the hidden states. Moments of
blocks that run more than once in a forward are held until their last run.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emloc.compression.block_runs import known_runs, write_runs
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.sensitivity import BlockProbe
from emloc.errors import ConfigError
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, loss_sum
from emloc.linalg.gram import Moments
from emloc.machine.progress import progress_bar
from emloc.streaming.call import Call, current_call
from emloc.streaming.input_rows import input_rows
from emloc.streaming.lockstep import LockstepError, lockstep
from emloc.streaming.real_rows import input_mask, may_be_expert, real_rows
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
    forget: Callable[[str], None],
    work: Path,
) -> None:
    """Run the micro-batches through the base, and hand every block's moments to `finish`.

    They are summed over all runs of the block. One pass does it unless a block turns out to run again after
    it was handed over; then another follows, in which it is known how often each one runs
    (`emloc.compression.block_runs`). Blocks that no sample needs are handed over in the end, without moments.

    Args:
        plan: its groups' moments are summed.
        done: blocks that are only run.
        title: of the progress bar.
        forget: told the blocks of which some were handed over too early; they are handed over again.
        work: folder in which the numbers of runs are kept.

    Raises:
        NumericalError: an activation is NaN; names the layer.
        ConfigError: layers share a weight, or it is not known which of the rows that a layer reads are
            padding.
    """
    refuse_shared(stream, plan)
    runs = known_runs(work)
    if runs is not None and done >= set(stream.blocks):
        return
    one = _Pass(stream, plan, done, title, finish, runs)
    one.run(batches)
    if runs is not None:
        return
    again = {block for block, count in one.seen.items() if count > 1}
    for block in again:
        forget(block)
    write_runs(work, one.seen)
    if one.stopped is not None:
        _Pass(stream, plan, one.stopped - again, title, finish, one.seen).run(batches)


class _Pass:
    """One forward of all micro-batches.

    Args:
        runs: how often each block runs; None: not known, so that blocks are handed over after their first
            run, until one of them runs again.

    Attributes:
        seen: how often each block ran.
        stopped: blocks that had been handed over or were done when a block ran again; None: none did.
    """

    def __init__(
        self,
        stream: UnitStream,
        plan: CompressionPlan,
        done: Set[str],
        title: str,
        finish: Callable[[Passed], None],
        runs: Mapping[str, int] | None,
    ) -> None:
        self._stream, self._plan, self._done = stream, plan, done
        self._title, self._finish, self._runs = title, finish, runs
        self._probe = BlockProbe(stream)
        self._open: dict[str, dict[str, Moments]] = {}
        self.seen = Counter[str]()
        self.stopped: set[str] | None = None

    def run(self, batches: Sequence[Batch]) -> None:
        """Run all calls as far as the last run of a block."""
        stream = self._stream
        calls = [Call(running(stream, batch)) for batch in batches]
        probed = [
            block
            for block in stream.blocks
            if any(group.wide or group.menu for group in self._plan.within(block))
        ]
        with progress_bar(self._title, len(stream.blocks)) as advance, self._probe.watching(probed):

            @contextmanager
            def visit(unit: str) -> Iterator[None]:
                with stream.filled(unit):
                    if unit not in stream.blocks:
                        yield
                        return
                    self._count(unit)
                    if self.stopped is None and unit not in self._done:
                        with self._summing(unit):
                            yield
                    else:
                        yield
                if self.seen[unit] == self._expected(unit):
                    advance(note=unit)

            lockstep(stream.model, stream.units, calls, visit, self._enough, stream.device)
            for block in stream.blocks:
                if self.seen[block] == 0 and self.stopped is None:  # a tower that no sample needs
                    if block not in self._done:
                        self._finish(Passed(block, {}, self._probe, time.monotonic()))
                    advance(note=block)

    def _expected(self, block: str) -> int:
        return 1 if self._runs is None else self._runs.get(block, 0)

    def _count(self, block: str) -> None:
        if self._runs is None and self.seen[block] == 1 and self.stopped is None:
            self.stopped = set(self._done) | set(self.seen)
        self.seen[block] += 1
        if self._runs is not None and self.seen[block] > self._expected(block):
            raise LockstepError(
                f"Block {block} runs more often than in the previous pass; give all micro-batches the same "
                f"structure."
            )

    @contextmanager
    def _summing(self, block: str) -> Iterator[None]:
        """Fold what the block's layers read, and hand it over after its last run."""
        started = time.monotonic()
        moments = self._open.pop(block, None)
        if moments is None:
            moments = _moments(self._plan, block)
        with self._probe.of(block):
            with _folding_block(self._stream, self._plan, block, moments):
                yield
            if self.seen[block] == self._expected(block):
                self._finish(Passed(block, moments, self._probe, started))
            else:
                self._open[block] = moments

    def _enough(self, waiting: Set[str | None]) -> bool:
        if self._runs is not None:
            return all(self.seen[block] == count for block, count in self._runs.items())
        return self.seen.keys() >= set(self._stream.blocks) and none_comes_again(
            self._stream, waiting
        )


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
                f"Layers {layer} and {others[0]} share one weight, which cannot be compressed for only one "
                f"of them; exclude both."
            )


def running(stream: UnitStream, batch: Batch) -> Callable[[], LossSum]:
    """A call's work: a micro-batch's forward to its loss, with the micro-batch as the call's context."""

    def run() -> LossSum:
        call = current_call()
        assert call is not None
        call.context = {name: tensor.to(stream.device) for name, tensor in batch.items()}
        return loss_sum(stream.family, stream.model, call.context)

    return run


def _moments(plan: CompressionPlan, block: str) -> dict[str, Moments]:
    """Moments of a block's groups, of nothing yet, by `Group.source`."""
    return {
        group.source: Moments(group.form.format.side(group.shape), group.source)
        for group in plan.within(block)
    }


@contextmanager
def _folding_block(
    stream: UnitStream, plan: CompressionPlan, block: str, moments: Mapping[str, Moments]
) -> Iterator[None]:
    """Fold the moments of a block's groups while it runs."""
    sources = {group.source: group for group in plan.within(block)}
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
        yield
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
    listed = may_be_expert(stream.model, block, group.owner)
    convolution = bool(group.shape.kernel)

    def fold(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        call = current_call()
        batch: Batch = {} if call is None else call.context
        mask = input_mask(stream.family, batch, group.owner, inputs[0], listed)

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
