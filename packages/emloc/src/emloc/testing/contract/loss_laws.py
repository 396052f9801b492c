"""Laws of the loss: every sample has its own, whatever shares its micro-batch."""

import pytest
import torch

from emloc.extend.losses import loss_sum, summed
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject


class LossLaws(SubjectFixture):
    """Promises of `loss` about the samples of a micro-batch."""

    def test_a_loss_is_that_of_each_sample(self, subject: Subject) -> None:
        """A micro-batch has the losses of its samples, each with the labels of its own.

        Of micro-batches whose tensors all hold one row per sample; others cannot be cut by rows.
        """
        batch = max(subject.batches, key=lambda one: len(next(iter(one.values()))))
        sizes = {tensor.shape[:1] for tensor in batch.values()}
        if len(sizes) > 1:
            return
        model = subject.family.load(subject.checkpoint, "float32", "cpu")
        rows = range(next(iter(batch.values())).shape[0])
        alone = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in rows]
        with torch.no_grad():
            whole = loss_sum(subject.family, model, batch)
            parts = [loss_sum(subject.family, model, part) for part in alone]
        together = summed(parts)
        assert together.terms == whole.terms
        assert together.total == pytest.approx(whole.total, rel=1e-4, abs=1e-4)
