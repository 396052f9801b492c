"""Choose how far a correction may go by the loss on data, in one streamed pass over the base.

How much correction helps depends on the LoRA and on the data: a fixed limit can be worse than none.
So every candidate is one more set of lockstep calls: each unit's weights are read once, and hooks on
the adapted layers add the candidate's own LoRA to their outputs. A unit's LoRAs are made when it is
loaded and dropped with it, so memory does not grow with the model's depth.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.machine.progress import progress_bar
from emloc.streaming.lockstep import Call, current_call, lockstep
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


def losses(
    stream: UnitStream,
    batches: Sequence[Batch],
    layers: Sequence[str],
    lora_of: Callable[[str], CandidateLora],
    candidates: int,
) -> list[float]:
    """Mean calibration loss of each candidate.

    Args:
        layers: names of the adapted ones.
        lora_of: makes a layer's LoRA under every candidate, when its unit's turn has come.

    Raises:
        NumericalError: a loss is NaN or infinite.
        DataError: no token has a label.
    """
    device = stream.device

    def run(batch: Batch) -> LossSum:
        here = {name: tensor.to(device) for name, tensor in batch.items()}
        return loss_sum(stream.family, stream.model, here)

    calls = [
        Call(partial(run, batch), context=candidate)
        for candidate in range(candidates)
        for batch in batches
    ]
    with progress_bar("choose limit", len(stream.units)) as advance:

        @contextmanager
        def visit(unit: str) -> Iterator[None]:
            with stream.filled(unit):
                # By module: two units may hold the same one.
                held = set(stream.model.get_submodule(unit).modules())
                inside = [n for n in layers if stream.model.get_submodule(n) in held]
                handles = [
                    stream.model.get_submodule(name).register_forward_hook(
                        _adding(lora_of(name).to(stream))
                    )
                    for name in inside
                ]
                try:
                    yield
                finally:
                    for handle in handles:
                        handle.remove()
            advance(note=unit)

        results: list[LossSum] = lockstep(stream.model, stream.units, calls, visit, device=device)
    return [
        summed(results[candidate * len(batches) : (candidate + 1) * len(batches)]).mean(
            f"The calibration samples, candidate {candidate + 1} of {candidates}"
        )
        for candidate in range(candidates)
    ]


def _delta(module: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """`B·A·x`; on a convolution, A reads the patches that it reads."""
    if not isinstance(module, nn.Conv2d):
        return torch.nn.functional.linear(x @ down.T, up)
    # A padding_mode other than zeros is the convolution's own business, so ask it.
    z = module._conv_forward(x, down, None)  # pyright: ignore[reportPrivateUsage]
    return torch.nn.functional.conv2d(z, up[:, :, None, None])


def _adding(lora: CandidateLora) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        call = current_call()
        if call is None:
            return output
        candidate: int = call.context
        x = inputs[0].to(lora.down.dtype)
        delta = _delta(module, x, lora.down, lora.ups[candidate]) * lora.scaling
        if lora.gains is None:
            return output + delta
        bias = dict(module.named_parameters()).get("bias", output.new_zeros(1))
        gain = lora.gains[candidate]
        if isinstance(module, nn.Conv2d):
            bias, gain = bias.view(-1, 1, 1), gain.view(-1, 1, 1)
        return gain * (output - bias + delta) + bias

    return add
