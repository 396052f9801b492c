"""Laws of the loss: every sample has its own, whatever shares its micro-batch."""

import pytest
import torch

from emloc.extend.losses import loss_sum, summed
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject


class LossLaws(SubjectFixture):
    """Promises of `loss` about the samples of a micro-batch."""

    def test_a_loss_is_that_of_each_sample(self, subject: Subject) -> None:
        """The parts of a micro-batch have the loss of the whole, each sample with the labels of its own.

        Of micro-batches whose tensors all hold one row per sample; others cannot be cut by rows.
        """
        batch = max(subject.batches, key=lambda one: len(next(iter(one.values()))))
        sizes = {tensor.shape[:1] for tensor in batch.values()}
        if len(sizes) > 1:
            return
        model = subject.family.load(subject.checkpoint, "float32", "cpu")
        first = {name: tensor[:1] for name, tensor in batch.items()}
        others = {name: tensor[1:] for name, tensor in batch.items()}
        with torch.no_grad():
            whole = loss_sum(subject.family, model, batch)
            parts = [loss_sum(subject.family, model, part) for part in (first, others)]
        together = summed(parts)
        assert together.terms == whole.terms
        assert together.total == pytest.approx(whole.total, rel=1e-4, abs=1e-4)
