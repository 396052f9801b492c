"""A pass over the base model beside the emulator that comes of it: errors of earlier layers are made up for.

Every micro-batch is called twice, on the base and on the emulator, both in lockstep. At a block the base's
calls run once, and what its layers read is kept. Then the emulator's calls run up to the first layers of the
block, again up to the next ones, and so on: as soon as all have read what a group of layers reads in the
emulator, the group is fitted, to give there what it gives in the base (`emloc.linalg.regression`), and has
its fitted weights when the next group's turn comes. In the end the emulator's calls run through the block.

The error that a layer reports is that of its form against the regression, on what it reads in the emulator.

What experts of a block read is not the same tokens in both; they are fitted on what they read in the
emulator, with their own weights as the target, all of them at once.

Peak memory beside that of one pass (`emloc.compression.one_pass`): the hidden states of both models, the
sums `Σ x x̂ᵀ`, and what the layers of one block read in the base, on the host.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emloc.compression.block_runs import known_runs, write_runs
from emloc.compression.emulator_folder import EmulatorFolder
from emloc.compression.groups import Group
from emloc.compression.one_pass import (
    none_comes_again,
    refuse_shared,
    running,
    weights_of,
)
from emloc.errors import ConfigError
from emloc.extend.family import Batch
from emloc.formats.layer_format import Tensors
from emloc.linalg.gram import Moments
from emloc.linalg.regression import regressed
from emloc.machine.progress import progress_bar
from emloc.streaming.call import Call, current_call, wait_before
from emloc.streaming.input_rows import input_rows
from emloc.streaming.lockstep import lockstep
from emloc.streaming.real_rows import input_mask, may_be_expert
from emloc.streaming.stream import UnitStream

TURN = " turn "
"""Stands between a block's name and the number of the turn that calls wait for."""

FitGroup = Callable[[Group, Sequence[Tensor], Moments], tuple[Tensors, dict[str, Any]]]
"""Fits a group's weights; returns its stored tensors and its entry in the report."""


class _Reached(BaseException):
    """Ends a run that has gone as far as it was needed."""


class _Emulated(Call):
    """A call on the emulator.

    Attributes:
        base: the same micro-batch's call on the base.
    """

    def __init__(self, run: Callable[[], Any], base: Call) -> None:
        super().__init__(run)
        self.base = base


@dataclass
class _Turns:
    """A block whose groups are fitted one after another.

    Attributes:
        groups: by the layer at which their moments are summed.
        order: those layers, as the base's calls came by them.
        experts: those among them that read tokens in an order and number of their own.
        turns: those that are fitted together, known when all of the base's calls are through.
        emulated: the weights that were fitted, by the names of the parameters that they replace.
        read: what layers read in the base, by call, in the order of their calls.
        fitted: by a group's owner, its stored tensors.
        reports: the entries in the block's report, likewise.
    """

    groups: dict[str, list[Group]]
    started: float
    order: list[str] = field(default_factory=list[str])
    experts: tuple[str, ...] = ()
    turns: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])
    emulated: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    read: dict[tuple[Call, str], list[Tensor]] = field(
        default_factory=dict[tuple[Call, str], list[Tensor]]
    )
    fitted: dict[str, Tensors] = field(default_factory=dict[str, Tensors])
    reports: dict[str, Any] = field(default_factory=dict[str, Any])


class _Sums:
    """The moments of what some layers read in the emulator, with what they read in the base."""

    def __init__(self, sources: Sequence[str]) -> None:
        self.moments = {source: Moments("input", source) for source in sources}
        self.cross: dict[str, Tensor] = {}
        self.calls: dict[tuple[Call, str], int] = {}

    def fold(self, source: str, rows: Tensor, before: Tensor) -> None:
        """Add rows of the emulator, and those of the base that they stand for."""
        moments = self.moments[source]
        moments.fold(rows)
        kind = moments.matrix.dtype
        if source not in self.cross:
            self.cross[source] = torch.zeros_like(moments.matrix)
        self.cross[source].addmm_(before.to(rows.device, kind).T, rows.to(kind))


def compress_propagating(
    stream: UnitStream, folder: EmulatorFolder, batches: Sequence[Batch], fit_group: FitGroup
) -> None:
    """Run the micro-batches through the base and the emulator, and write every block's shard into `folder`.

    Raises:
        NumericalError: a weight or an activation is NaN; names the layer.
        ConfigError: a block runs more than once in a forward, or see
            `emloc.compression.one_pass.stream_moments`.
    """
    runs = known_runs(folder.work)
    for block, count in (runs or {}).items():
        if count > 1:
            raise _runs_again(block)
    done = folder.finished_blocks()
    if runs is None or done < set(stream.blocks):
        one = _Propagation(stream, folder, done, fit_group)
        one.run(batches)
        if runs is None:
            write_runs(folder.work, Counter(one.seen))


def _runs_again(block: str) -> ConfigError:
    return ConfigError(
        f"propagate_errors: block {block} runs more than once in a forward pass of this model, so it would "
        f"have to be fitted before its later runs are known; leave the option out."
    )


class _Propagation:
    """One pass.

    Attributes:
        seen: blocks that ran.
    """

    def __init__(
        self, stream: UnitStream, folder: EmulatorFolder, done: Set[str], fit_group: FitGroup
    ) -> None:
        self._stream, self._folder, self._done = stream, folder, done
        self._fit_group = fit_group
        self.seen = set[str]()
        self._turns: _Turns | None = None
        self._sums = _Sums(())

    def run(self, batches: Sequence[Batch]) -> None:
        """Run all calls as far as the last block."""
        stream, blocks = self._stream, self._stream.blocks
        refuse_shared(stream, self._folder.plan)
        calls: list[Call] = []
        for batch in batches:
            base = Call(running(stream, batch))
            calls += [base, _Emulated(running(stream, batch), base)]
        with progress_bar("compress", len(blocks)) as advance, self._taking_turns():

            @contextmanager
            def visit(unit: str) -> Iterator[None]:
                block, _, turn = unit.partition(TURN)
                with self._first(block) if not turn else self._take_turn(block, int(turn)):
                    yield
                if block in blocks and turn and int(turn) == self._last:
                    self._turns = None
                    advance(note=block)

            lockstep(stream.model, stream.units, calls, visit, self._enough, stream.device)
        for block in blocks:
            if block not in self.seen | self._done:  # a tower that no sample needs
                self._write(block, _Turns(self._groups(block), time.monotonic()))

    @property
    def _last(self) -> int:
        """The number of the last turn of the block, in which the emulator's calls go through it."""
        return 0 if self._turns is None else len(self._turns.turns)

    def _groups(self, block: str) -> dict[str, list[Group]]:
        groups: dict[str, list[Group]] = {}
        for group in self._folder.plan.within(block):
            groups.setdefault(group.source, []).append(group)
        return groups

    def _enough(self, waiting: Set[str | None]) -> bool:
        if not self.seen.issuperset(self._stream.blocks):
            return False
        if any(unit is not None and TURN in unit for unit in waiting):
            return False
        return none_comes_again(self._stream, waiting)

    @contextmanager
    def _first(self, unit: str) -> Iterator[None]:
        """A unit's weights for all calls; at a block, for those of the base."""
        stream = self._stream
        if unit not in stream.blocks:
            with stream.filled(unit):
                yield
            return
        if unit in self.seen:
            # Or the next call would take what was written for complete.
            self._folder.forget_block(unit)
            raise _runs_again(unit)
        self.seen.add(unit)
        if unit not in self._done:
            self._turns = _Turns(self._groups(unit), time.monotonic())
        with stream.filled(unit), self._watching(self._turns):
            yield
        if self._turns is not None:
            self._set_turns(unit, self._turns)
            if not self._turns.turns:
                self._write(unit, self._turns)

    def _set_turns(self, block: str, turns: _Turns) -> None:
        """Each layer by itself, but experts together, when the first of them is read."""
        in_lists = [n for n in turns.order if may_be_expert(self._stream.model, block, n)]
        chosen = {name for (_, name), kept in turns.read.items() if any(x.ndim == 2 for x in kept)}
        turns.experts = tuple(name for name in in_lists if name in chosen)
        for name in turns.order:
            if name not in turns.experts:
                turns.turns.append((name,))
            elif name == turns.experts[0]:
                turns.turns.append(turns.experts)

    @contextmanager
    def _take_turn(self, block: str, turn: int) -> Iterator[None]:
        """The emulator's weights of a block, as far as they are known, for its calls."""
        stream, turns = self._stream, self._turns
        if turns is None:
            with stream.filled(block, self._folder.emulated(block)):
                yield
            return
        with stream.filled(block, turns.emulated):
            if turn == len(turns.turns):
                yield
                return
            sources = turns.turns[turn]
            self._sums = _Sums(sources)
            with self._watching(turns):
                yield
            for source in sources:
                self._fit(turns, source)
            turns.read = {key: kept for key, kept in turns.read.items() if key[1] not in sources}
            self._sums = _Sums(())
        if turn + 1 == len(turns.turns):
            self._write(block, turns)

    def _fit(self, turns: _Turns, source: str) -> None:
        moments, cross = self._sums.moments[source], self._sums.cross.get(source)
        if cross is None:
            return
        for group in turns.groups[source]:
            weights = [
                regressed(weight, moments.matrix, cross)
                for weight in weights_of(self._stream, group)
            ]
            tensors, report = self._fit_group(group, weights, moments)
            turns.fitted[group.owner], turns.reports[group.owner] = tensors, report
            turns.emulated |= self._folder.dense_of(group, tensors)

    def _write(self, block: str, turns: _Turns) -> None:
        groups = [group for each in turns.groups.values() for group in each]
        unreached = [n for g in groups if g.owner not in turns.fitted for n in g.layers]
        layers = {
            group.owner: turns.reports[group.owner]
            for group in groups
            if group.owner in turns.reports
        }
        seconds = round(time.monotonic() - turns.started, 3) if layers else 0.0
        report = {"layers": layers, "unreached": unreached, "seconds": seconds}
        self._folder.write_block(block, turns.fitted, report)

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        """Have calls wait inside blocks: the emulator's before each run, the base's after theirs."""
        modules = {block: self._stream.model.get_submodule(block) for block in self._stream.blocks}
        for block, module in modules.items():
            module.forward = partial(self._forward, block, module, module.forward)
        try:
            yield
        finally:
            for module in modules.values():
                del module.forward

    def _forward(
        self,
        block: str,
        module: nn.Module,
        run: Callable[..., Any],
        /,
        *inputs: Any,
        **named: Any,
    ) -> Any:
        call = current_call()
        if call is None:
            return run(*inputs, **named)
        output, turn = None, 0
        if not isinstance(call, _Emulated):
            output = run(*inputs, **named)
            if self._turns is not None and block in self._turns.groups:
                self._look(self._turns, block, module, inputs, output)
        while True:
            given = (inputs, named) if isinstance(call, _Emulated) else output
            wait_before(f"{block}{TURN}{turn}", given)
            if not isinstance(call, _Emulated):
                if turn == self._last:
                    return output
            elif turn == self._last:
                return run(*inputs, **named)
            else:
                try:
                    made = run(*inputs, **named)
                    if self._turns is not None and block in self._turns.groups:
                        self._look(self._turns, block, module, inputs, made)
                except _Reached:
                    pass
            turn += 1

    @contextmanager
    def _watching(self, turns: _Turns | None) -> Iterator[None]:
        """Look at what the layers of a block read; a block that is itself one is looked at by `_forward`."""
        with ExitStack() as stack:
            if turns is not None:
                for source in turns.groups.keys() - set(self._stream.blocks):
                    module = self._stream.model.get_submodule(source)
                    hook = partial(self._look, turns, source)
                    stack.callback(module.register_forward_hook(hook).remove)
            yield

    def _look(
        self, turns: _Turns, source: str, module: nn.Module, inputs: tuple[Any, ...], output: Any
    ) -> None:
        call = current_call()
        if not isinstance(call, _Emulated):
            assert call is not None
            if source not in turns.order:
                turns.order.append(source)
            kept = inputs[0].detach().to("cpu")
            turns.read.setdefault((call, source), []).append(kept)
        elif source in self._sums.moments:
            self._fold(turns, source, module, call, inputs[0], output)

    def _fold(
        self,
        turns: _Turns,
        source: str,
        module: nn.Module,
        call: _Emulated,
        x: Tensor,
        output: Tensor,
    ) -> None:
        expert, read = source in turns.experts, turns.read.get((call.base, source), [])
        at = self._sums.calls.get((call, source), 0)
        self._sums.calls[call, source] = at + 1
        mask = input_mask(self._stream.family, call.context, source, x, expert)
        rows = partial(input_rows, module, output=output, mask=mask, what=f"Layer {source}")
        paired = not expert and at < len(read) and read[at].shape == x.shape
        befores = rows(read[at].to(x.device)) if paired else rows(x)
        for one, before in zip(rows(x), befores):
            self._sums.fold(source, one, before)
        if not expert and at + 1 >= len(read):
            raise _Reached
