"""Ways to correct an adapter, among which data choose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from emloc.config import CorrectConfig
from emloc.options.types import DEQUANTISED


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        limit: of the paper's form, a factor; None: no limit.
        share: of the fit to the data, in place of the paper's form.
        dequantised: no correction, but the weights that the adapter was trained beside.
    """

    limit: float | None = None
    share: float | None = None
    dequantised: bool = False

    @property
    def corrects(self) -> bool:
        """Return whether it changes the adapter."""
        return self.limit != 0

    @property
    def by_data(self) -> bool:
        """Return whether it needs to know what the LoRA reads on data."""
        return self.share is not None

    @property
    def shown(self) -> str:
        """The name in tables and manifests: `3`, `none` (no limit), `data 0.5`, `dequantised`."""
        if self.dequantised:
            return DEQUANTISED
        if self.share is not None:
            return f"data {self.share:g}"
        return "none" if self.limit is None else f"{self.limit:g}"


UNCORRECTED = Way(0.0)
ON_DEQUANTISED = Way(0.0, None, dequantised=True)


def given_way(config: CorrectConfig) -> Way:
    """The way that the options name; `limit` is no `auto`, or a strength is given."""
    if config.strength is not None:
        return Way(None, config.strength)
    return _limited(config.limit)


def with_dequantised(config: CorrectConfig) -> CorrectConfig:
    """The options for an adapter of a base in few bits: the dequantised weights are one more candidate,
    unless candidates are given.
    """
    if "limit_candidates" in config.model_fields_set:
        return config
    more = [*config.limit_candidates, DEQUANTISED]
    return config.model_copy(update={"limit_candidates": more})


def candidates(config: CorrectConfig) -> list[Way]:
    """The ways that `limit=auto` compares, no correction first."""
    limited = [_limited(limit) for limit in config.limit_candidates]
    by_data = [Way(None, share) for share in config.strength_candidates]
    return list(dict.fromkeys([UNCORRECTED, *limited, *by_data]))


def best_way(ways: Sequence[Way], chosen_on: Sequence[float], checked_on: Sequence[float]) -> Way:
    """The way of the least loss on one half of the data, if on the other it is no worse than none.

    Args:
        ways: no correction first.
        chosen_on, checked_on: losses, in the order of the ways.
    """
    best = min(range(len(ways)), key=lambda i: chosen_on[i])
    return ways[best] if checked_on[best] <= checked_on[0] else ways[0]


def _limited(limit: Any) -> Way:
    if limit == DEQUANTISED:
        return ON_DEQUANTISED
    return Way(None if limit == "none" else float(limit))
