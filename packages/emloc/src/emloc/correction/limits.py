"""Choose how far a correction may go by the loss on data, in one streamed pass over the base.

How much correction helps depends on the LoRA and on the data: a fixed limit can be worse than none.
So every candidate is one more set of lockstep calls: each unit's weights are read once, and hooks on
the adapted layers add the candidate's own LoRA to their outputs. A unit's LoRAs are made when it is
loaded and dropped with it, so memory does not grow with the model's depth.

Candidate 0 is the adapter as it is. Its calls come first at every unit; where candidates depend on what the
LoRA reads (`emloc.correction.reads`), that is summed while they run, and the other candidates are made when
they are through.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emloc.correction.other_weights import OtherWeights
from emloc.correction.reads import Reads
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.linalg.convolution import as_matrix
from emloc.machine.progress import progress_bar
from emloc.streaming.call import Call, current_call
from emloc.streaming.input_rows import input_rows
from emloc.streaming.lockstep import lockstep
from emloc.streaming.real_rows import input_mask, is_head, may_be_expert
from emloc.streaming.stream import UnitStream


@dataclass(frozen=True)
class CandidateLora:
    """One layer's LoRA under every candidate.

    Attributes:
        down: A, shared, as it is stored.
        ups: B per candidate.
        scaling: of B·A.
        gains: DoRA's `m / ‖W + s·B·A‖` per candidate, or None.
    """

    down: Tensor
    ups: Sequence[Tensor]
    scaling: float
    gains: Sequence[Tensor] | None

    def to(self, stream: UnitStream) -> "CandidateLora":
        """The same on the stream's device, in its dtype."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(stream.device, stream.dtype)

        gains = None if self.gains is None else [move(gain) for gain in self.gains]
        return CandidateLora(move(self.down), [move(up) for up in self.ups], self.scaling, gains)


@dataclass(frozen=True)
class Watched:
    """Sums of what the LoRAs read, made while candidate 0 runs.

    Attributes:
        reads: where they are summed.
        original: gives a layer's LoRA as it is, as the one candidate.
        apart: whether they are made in a pass of their own, or were: all units may run again then.
    """

    reads: Reads
    original: Callable[[str], CandidateLora]
    apart: bool = False


class _RunsAgain(Exception):
    """A layer whose sum was taken is about to read more."""


def losses(
    stream: UnitStream,
    batches: Sequence[Batch],
    layers: Sequence[str],
    lora_of: Callable[[str], CandidateLora],
    candidates: int,
) -> list[float]:
    """Mean calibration loss of each candidate; see `batch_losses`."""
    every = batch_losses(stream, batches, layers, lora_of, range(candidates))
    return [mean_loss(parts, number) for number, parts in enumerate(every)]


def mean_loss(parts: Sequence[LossSum], candidate: int) -> float:
    """The loss of a candidate over some micro-batches.

    Raises:
        NumericalError: it is NaN or infinite.
        DataError: no token has a label.
    """
    return summed(parts).mean(f"The calibration samples, candidate {candidate + 1}")


def batch_losses(
    stream: UnitStream,
    batches: Sequence[Batch],
    layers: Sequence[str],
    lora_of: Callable[[str], CandidateLora],
    candidates: Sequence[int],
    watched: Watched | None = None,
    other: OtherWeights | None = None,
) -> list[list[LossSum]]:
    """Calibration losses of each candidate on each micro-batch.

    Args:
        layers: names of the adapted ones.
        lora_of: makes a layer's LoRA under every candidate, when its unit's turn has come.
        candidates: places in `CandidateLora.ups` that are run; with `watched` the first is 0.
        watched: sums to be made, on which `lora_of` may depend.
        other: the candidate that runs on other weights, if one does.
    """
    run_all = partial(_run, stream, batches, layers, lora_of)
    try:
        return run_all(candidates, watched, other)
    except _RunsAgain:
        # Of a model that goes through its blocks again, all runs are summed before others depend on them.
        assert watched is not None
        watched.reads.forget()
        apart = replace(watched, apart=True)
        few = batches[: watched.reads.calls]
        _run(stream, few, layers, lora_of, [0], apart, None)
        watched.reads.close_all()
        return run_all(candidates, apart, other)


def _run(
    stream: UnitStream,
    batches: Sequence[Batch],
    layers: Sequence[str],
    lora_of: Callable[[str], CandidateLora],
    candidates: Sequence[int],
    watched: Watched | None,
    other: OtherWeights | None,
) -> list[list[LossSum]]:
    device = stream.device

    def run(batch: Batch) -> LossSum:
        call = current_call()
        assert call is not None
        call.context = (*call.context, {n: tensor.to(device) for n, tensor in batch.items()})
        return loss_sum(stream.family, stream.model, call.context[-1])

    calls = [
        Call(partial(run, batch), context=(candidate, number))
        for candidate in candidates
        for number, batch in enumerate(batches)
    ]
    with progress_bar("choose limit", len(stream.units)) as advance:

        @contextmanager
        def visit(unit: str) -> Iterator[None]:
            with stream.filled(unit):
                # By module: two units may hold the same one.
                held = set(stream.model.get_submodule(unit).modules())
                inside = [n for n in layers if stream.model.get_submodule(n) in held]
                reads = None if watched is None or watched.apart else watched.reads
                if reads is not None and any(map(reads.has, inside)):
                    raise _RunsAgain
                handles: list[Any] = []
                if other is not None:
                    changed = [n for n in other.layers if stream.model.get_submodule(n) in held]
                    handles += [other.hooked(stream, name) for name in changed]
                handles += [
                    stream.model.get_submodule(name).register_forward_hook(
                        _hook(stream, unit, name, lora_of, watched)
                    )
                    for name in inside
                ]
                try:
                    yield
                finally:
                    for handle in handles:
                        handle.remove()
                if reads is not None:
                    for name in inside:
                        reads.close(name)
            advance(note=unit)

        results: list[LossSum] = lockstep(stream.model, stream.units, calls, visit, device=device)
    size = len(batches)
    return [results[start : start + size] for start in range(0, len(results), size)]


def _hook(
    stream: UnitStream,
    unit: str,
    name: str,
    lora_of: Callable[[str], CandidateLora],
    watched: Watched | None,
) -> Any:
    if watched is None:
        return _adding(lora_of(name).to(stream))
    reads, original = watched.reads, watched.original(name).to(stream)
    listed = may_be_expert(stream.model, unit, name) or is_head(stream.model, name)
    plain, others = _adding(original), dict[str, Any]()

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        call = current_call()
        if call is None:
            return output
        candidate, number, batch = call.context
        if candidate == 0:
            if reads.wants(name, number):
                mask = input_mask(stream.family, batch, name, inputs[0], listed)
                down = as_matrix(original.down)
                for rows in input_rows(module, inputs[0], output, mask, f"Layer {name}"):
                    reads.fold(name, rows, rows.to(down.dtype) @ down.T)
            return plain(module, inputs, output)
        if not others:
            if not watched.apart:
                reads.close(name)
            others["add"] = _adding(lora_of(name).to(stream))
        return others["add"](module, inputs, output)

    return add


CONVOLVE: dict[int, Any] = {
    1: torch.nn.functional.conv1d,
    2: torch.nn.functional.conv2d,
    3: torch.nn.functional.conv3d,
}
"""Convolutions by their dimensions."""


def _dimensions(module: nn.Module) -> int:
    """Dimensions that a convolution goes over; 0 of a layer that is none."""
    return len(module.kernel_size) if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 0


def _delta(module: Any, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`B·A·x`; on a convolution, A reads the patches that PEFT's does: zeros around, nothing left out."""
    convolve = CONVOLVE.get(_dimensions(module))
    if convolve is None:
        return torch.nn.functional.linear(x @ down.T, up)
    z = convolve(x, down, None, module.stride, module.padding)
    return convolve(z, up.view(*up.shape, *(1 for _ in module.kernel_size)))


def _adding(lora: CandidateLora) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        call = current_call()
        if call is None:
            return output
        candidate: int = call.context[0]
        x = inputs[0].to(lora.down.dtype)
        delta = _delta(module, x, lora.down, lora.ups[candidate]) * lora.scaling
        if lora.gains is None:
            return output + delta
        bias = dict(module.named_parameters()).get("bias", output.new_zeros(1))
        gain = lora.gains[candidate]
        ones = [1] * _dimensions(module)
        bias, gain = bias.view(-1, *ones), gain.view(-1, *ones)
        return gain * (output - bias + delta) + bias

    return add
