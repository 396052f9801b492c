"""Losses as sums with their number of terms, so that micro-batches can be added up."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, runtime_checkable

from torch import nn

from emloc.errors import DataError, NumericalError
from emloc.extend.family import Batch, ModelFamily


class LossSum(NamedTuple):
    """A loss summed over what it averages (tokens, pixels), so that batches can be added up."""

    total: float
    terms: int

    def mean(self, what: str) -> float:
        """The loss per term.

        Args:
            what: what it is the loss of, for messages: a data set, a step.

        Raises:
            DataError: there are no terms, so there is no loss, and 0 would be the best of all.
            NumericalError: it is NaN or infinite.
        """
        if self.terms == 0:
            raise DataError(
                f"{what}: no token has a label, so there is no loss; check that prompts leave room for "
                f"answers within max_length."
            )
        if not math.isfinite(self.total):
            raise NumericalError(
                f"{what}: the loss is {self.total / self.terms}; the model or its adapter holds or produces "
                f"values that are not numbers. Check both with emloc verify, or try another dtype."
            )
        return self.total / self.terms


def summed(parts: Iterable[LossSum]) -> LossSum:
    """The loss over all parts together."""
    total, terms = 0.0, 0
    for part in parts:
        total, terms = total + part.total, terms + part.terms
    return LossSum(total, terms)


def loss_sum(family: ModelFamily, model: nn.Module, batch: Batch) -> LossSum:
    """A family's loss of one micro-batch as a number, without its graph."""
    total, terms = family.loss(model, batch)
    return LossSum(float(total.detach()), terms)


@runtime_checkable
class ScoresBatches(Protocol):
    """A family with more to say of a micro-batch than its loss, such as how many classes were right."""

    def scores(self, model: nn.Module, batch: Batch) -> Mapping[str, LossSum]:
        """Sums over a micro-batch, each with what it is divided by, in one forward of the model.

        Args:
            batch: on the model's device.

        Returns:
            `loss` as `ModelFamily.loss` gives it, and others by the names under which `emloc evaluate`
            prints them, for example `accuracy`.
        """
        ...


def scores_of(family: ModelFamily, model: nn.Module, batch: Batch) -> Mapping[str, LossSum]:
    """Sums over a micro-batch by their names; by default the loss alone."""
    if isinstance(family, ScoresBatches):
        return family.scores(model, batch)
    return {"loss": loss_sum(family, model, batch)}
