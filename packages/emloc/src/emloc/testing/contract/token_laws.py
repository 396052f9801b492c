"""Laws of padding: what every layer counts as read, against samples that went through one by one.

A sample alone has no padding, so all that its layers read is real. Whatever micro-batches the samples are put
into, the second moments are sums over the same rows: as many of them, and of the same size.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emloc.extend.capabilities import token_count, token_mask_of
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.streaming.call import Call, current_call
from emloc.streaming.input_rows import input_rows
from emloc.streaming.lockstep import lockstep
from emloc.streaming.real_rows import is_expert
from emloc.streaming.stream import UnitStream
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

SAMPLES = 6


class TokenLaws(SubjectFixture):
    """Promises of `token_mask`."""

    def test_every_layer_reads_the_real_rows_and_no_others(self, subject: Subject) -> None:
        """Rows and their squares are those of samples that go one by one, layer by layer.

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
        for layer, (rows, squares) in expected.items():
            assert read[layer][0] == rows, f"rows that {layer} reads"
            if alike:
                assert read[layer][1] == pytest.approx(squares, rel=1e-2), f"what {layer} reads"


def _rows_read(
    subject: Subject, batches: Sequence[Batch]
) -> tuple[dict[str, tuple[int, float]], float]:
    """Real rows and the sum of their squares, by layer; experts, which choose their rows, left out.

    And the loss of all, by which the samples are known to be the same.
    """
    stream = UnitStream(subject.family, subject.checkpoint)
    read: dict[str, tuple[int, float]] = {}

    def counting(layer: str) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            call = current_call()
            assert call is not None
            mask = token_mask_of(subject.family, call.context, layer)
            rows, squares = read.get(layer, (0, 0.0))
            for part in input_rows(module, inputs[0], output, mask, f"Layer {layer}"):
                rows, squares = rows + len(part), squares + float(part.double().square().sum())
            read[layer] = rows, squares

        return count

    blocks = [(block, f"{block}.") for block in stream.blocks]
    for layer in (name for group in subject.family.layer_groups(stream.model) for name in group):
        owner = next(block for block, inside in blocks if f"{layer}.".startswith(inside))
        if not is_expert(stream.model, owner, layer):
            stream.model.get_submodule(layer).register_forward_hook(counting(layer))
    calls = [
        Call(lambda b=batch: loss_sum(subject.family, stream.model, b), context=batch)  # pyright: ignore[reportUnknownLambdaType]
        for batch in batches
    ]
    with torch.no_grad():
        losses: list[LossSum] = lockstep(stream.model, stream.units, calls, stream.filled)
    return read, summed(losses).total
