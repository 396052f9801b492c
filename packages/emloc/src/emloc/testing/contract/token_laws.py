"""Laws of padding: what every layer counts as read, against samples that went through one by one.

A sample alone has no padding, so all that its layers read is real. Whatever micro-batches the samples are put
into, the second moments are sums over the same rows: as many of them, and of the same size. What blocks write
is held to the same, since the effect of a layer's error is taken there.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emloc.compression.sensitivity import hidden_states
from emloc.extend.capabilities import token_count, token_mask_of
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.streaming.call import Call, current_call
from emloc.streaming.input_rows import input_rows
from emloc.streaming.lockstep import lockstep
from emloc.streaming.real_rows import may_be_expert, real_rows
from emloc.streaming.stream import UnitStream
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

SAMPLES = 6


class TokenLaws(SubjectFixture):
    """Promises of `token_mask`."""

    def test_every_layer_reads_the_real_rows_and_no_others(self, subject: Subject) -> None:
        """Rows and their squares are those of samples that go one by one, by layer and by block.

        Of data with noise that is drawn for each micro-batch, their number alone.
        """
        together, alone = (
            subject.calibration(num_calibration_samples=SAMPLES, calibration_batch_size=size)
            for size in (SAMPLES, 1)
        )
        assert len(alone) >= len(together)
        counts = [
            sum(token_count(subject.family, batch) for batch in batches)
            for batches in (together, alone)
        ]
        assert counts[0] == counts[1] > 0, "tokens of the micro-batches"
        (read, loss), (expected, whole) = (
            _rows_read(subject, batches) for batches in (together, alone)
        )
        assert read.keys() == expected.keys()
        alike = loss == pytest.approx(whole, rel=1e-3)
        for what, (rows, squares) in expected.items():
            assert read[what][0] == rows, f"rows that {what}"
            if alike:
                assert read[what][1] == pytest.approx(squares, rel=1e-2), f"what {what}"


def _rows_read(
    subject: Subject, batches: Sequence[Batch]
) -> tuple[dict[str, tuple[int, float]], float]:
    """Real rows and the sum of their squares, by what reads or writes them.

    Experts, which choose their rows, are left out.

    And the loss of all, by which the samples are known to be the same.
    """
    stream = UnitStream(subject.family, subject.checkpoint)
    read: dict[str, tuple[int, float]] = {}

    def add(what: str, parts: Iterable[Tensor]) -> None:
        rows, squares = read.get(what, (0, 0.0))
        for part in parts:
            rows, squares = rows + len(part), squares + float(part.double().square().sum())
        read[what] = rows, squares

    def mask_of(name: str) -> Tensor | None:
        call = current_call()
        assert call is not None
        return token_mask_of(subject.family, call.context, name)

    def counting(layer: str, listed: bool) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if listed and inputs[0].ndim == 2:  # an expert
                return
            parts = input_rows(module, inputs[0], output, mask_of(layer), f"Layer {layer}")
            add(f"layer {layer} reads", parts)

        return count

    def counting_written(block: str) -> Any:
        def count(module: nn.Module, _: Any, output: Any) -> None:
            mask = mask_of(block)
            for state in hidden_states(module, output, mask)[:1]:
                add(f"block {block} writes", [real_rows(state, mask, f"Block {block}")])

        return count

    blocks = [(block, f"{block}.") for block in stream.blocks]
    for block in stream.blocks:
        stream.model.get_submodule(block).register_forward_hook(counting_written(block))
    for layer in (name for group in subject.family.layer_groups(stream.model) for name in group):
        owner = next(block for block, inside in blocks if f"{layer}.".startswith(inside))
        listed = may_be_expert(stream.model, owner, layer)
        stream.model.get_submodule(layer).register_forward_hook(counting(layer, listed))
    calls = [
        Call(lambda b=batch: loss_sum(subject.family, stream.model, b), context=batch)  # pyright: ignore[reportUnknownLambdaType]
        for batch in batches
    ]
    with torch.no_grad():
        losses: list[LossSum] = lockstep(stream.model, stream.units, calls, stream.filled)
    return read, summed(losses).total
