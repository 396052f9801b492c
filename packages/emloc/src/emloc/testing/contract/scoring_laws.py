"""Laws of the losses that models are judged by: an evaluation's, and the one that chooses a correction."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.extend.capabilities import WritesExample, example_of
from emloc.extend.family import Batch
from emloc.extend.losses import loss_sum, summed
from emloc.testing.contract.fixtures import SubjectFixture
from emloc.testing.contract.subject import Subject

FEW = 3
SAMPLES = 16
OTHER_SEED = 91
EXACT, NOISY = 1e-3, 0.1
"""Shares of a loss by which two of the same samples may differ."""


class ScoringLaws(SubjectFixture):
    """Promises of `evaluate`, by core or by the family, and of what `correct` chooses by data."""

    def test_an_evaluation_is_of_the_samples_that_are_asked_for(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """Scores are of so many samples of the named data, whatever number of them goes together."""
        few = subject.evaluate(num_samples=FEW)
        every = subject.evaluate(per_device_eval_batch_size=5)
        assert FEW <= few["samples"] < every["samples"]
        assert every["loss"] != few["loss"]
        alone = subject.evaluate(per_device_eval_batch_size=1)
        assert alone["samples"] == every["samples"]
        assert alone["loss"] == pytest.approx(every["loss"], rel=_tolerance(subject))
        if isinstance(subject.family, WritesExample):
            other = example_of(subject.family, tmp_path, seed=OTHER_SEED)
            assert subject.evaluate(dataset=other["dataset"])["loss"] != every["loss"]

    def test_an_evaluation_is_by_the_loss_of_the_family(self, subject: Subject) -> None:
        """The loss by which compression weighs errors and correction chooses, of all samples at once."""
        scores = subject.evaluate()
        batches = subject.calibration(num_calibration_samples=scores["samples"])
        model = subject.family.load(subject.checkpoint, "float32", "cpu")
        loss = _mean_loss(subject, model, batches)
        assert loss == pytest.approx(scores["loss"], rel=_tolerance(subject))

    def test_what_is_chosen_by_data_is_no_worse_than_no_correction(
        self, subject: Subject, tmp_path: Path
    ) -> None:
        """The merged model has the loss that was written down when the limit was chosen."""
        few = {"num_calibration_samples": SAMPLES}
        chosen = subject.correct(tmp_path / "chosen", limit="auto", **few)
        batches = subject.calibration(**few)
        said = Manifest.read(chosen).summary
        plain = subject.correct(tmp_path / "plain", limit=0)
        losses: list[float] = []
        for name, adapter in (("merged", chosen), ("as_it_was", plain)):
            merged = emloc.merge(adapter=str(adapter), output_dir=tmp_path / name)
            model = subject.family.load(Checkpoint.open(str(merged)), "float32", "cpu")
            losses.append(_mean_loss(subject, model, batches))
        recorded = said["calibration_loss"]
        assert losses == pytest.approx([recorded[said["limit"]], recorded["0"]], rel=1e-3)
        assert losses[0] <= losses[1] * (1 + 1e-4)


def _mean_loss(subject: Subject, model: nn.Module, batches: Sequence[Batch]) -> float:
    with torch.no_grad():
        parts = [loss_sum(subject.family, model, batch) for batch in batches]
    return summed(parts).mean("The samples")


def _tolerance(subject: Subject) -> float:
    """The share by which two losses of the same samples may differ; more where micro-batches draw noise."""
    model = subject.family.load(subject.checkpoint, "float32", "cpu")
    together, alone = (
        _mean_loss(subject, model, subject.calibration(calibration_batch_size=size))
        for size in (8, 1)
    )
    return EXACT if together == pytest.approx(alone, rel=EXACT) else NOISY
