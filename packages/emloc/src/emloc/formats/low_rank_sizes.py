"""The number of directions that each layer keeps.

`keep_ratio` is the share of a weight's bytes that its two factors may hold:
`rank · (d_out + d_in) ≤ keep_ratio · d_out · d_in`, at least one. Layers that read the same input
are stacked, so for them d_out is the sum.
"""

from collections.abc import Mapping
from typing import NamedTuple

from emloc.options.patterns import match_pattern

LEAST = 0.25
"""A layer keeps this share of its uniform rank: its sensitivity was measured at that rank, on a few
samples, and says little about losing all (an expert may have met no token at all)."""

MOST = 3.0
"""A layer gets so many times its uniform rank: the pass computes factors of that rank, and at small
ratios the rank at which factors are as large as the weight is far beyond what any layer was given."""


class Decision(NamedTuple):
    """A rank to compress to, or None with the reason to keep the layer dense."""

    rank: int | None
    reason: str


def rank_for(keep_ratio: float, d_out: int, d_in: int) -> int:
    """The largest rank whose factors hold at most `keep_ratio` of the weight's parameters."""
    return max(1, int(keep_ratio * d_out * d_in / (d_out + d_in)))


def factors_are_smaller(rank: int, d_out: int, d_in: int) -> bool:
    """Return whether rank-`rank` factors hold fewer parameters than the dense weight."""
    return rank * (d_out + d_in) < d_out * d_in


def largest_smaller_rank(d_out: int, d_in: int) -> int:
    """The largest rank whose factors are smaller than the dense weight; 0 if none is."""
    return (d_out * d_in - 1) // (d_out + d_in)


def rank_range(uniform: int, d_out: int, d_in: int) -> tuple[int, int]:
    """Least and largest rank that a layer of uniform rank `uniform` may be given."""
    least = max(1, int(LEAST * uniform))
    return least, max(uniform, min(int(MOST * uniform), largest_smaller_rank(d_out, d_in)))


def decide(
    name: str,
    d_out: int,
    d_in: int,
    ratio: float,
    rank_pattern: Mapping[str, int],
) -> Decision:
    """The rank of one layer (or stacked group), or why it stays dense.

    A rank asked for by `rank_pattern` is taken as it is, up to full rank, even where its factors
    are larger than the weight; a ratio never makes a layer larger.

    Args:
        ratio: the share of its bytes that it may keep.
    """
    explicit = match_pattern(rank_pattern, name)
    if explicit is not None:
        return Decision(min(explicit, d_out, d_in), "rank_pattern")
    if ratio == 1:
        return Decision(None, "keep_ratio 1")  # all parameters kept: the weight itself, no error
    rank = rank_for(ratio, d_out, d_in)
    if not factors_are_smaller(rank, d_out, d_in):
        return Decision(None, f"factors of rank {rank} would not be smaller than {d_out}x{d_in}")
    return Decision(rank, f"keep_ratio {ratio:g}")
