"""How many directions each layer keeps.

`keep_ratio` is the share of a weight's parameters that its two factors may hold:
`rank · (d_out + d_in) ≤ keep_ratio · d_out · d_in`, at least one. Layers that read the same input
are stacked, so for them d_out is the sum. Patterns are regular expressions that must match from a
dot or the beginning to the end of a layer's name, as PEFT matches its rank_pattern.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from emloc.errors import ConfigError

T = TypeVar("T")


class Decision(NamedTuple):
    """A rank to compress to, or None with the reason to keep the layer dense."""

    rank: int | None
    reason: str


def rank_for(keep_ratio: float, d_out: int, d_in: int) -> int:
    """The largest rank whose factors hold at most `keep_ratio` of the weight's parameters."""
    return max(1, int(keep_ratio * d_out * d_in / (d_out + d_in)))


def factors_are_smaller(rank: int, d_out: int, d_in: int) -> bool:
    """Whether rank-`rank` factors hold fewer parameters than the dense weight."""
    return rank * (d_out + d_in) < d_out * d_in


def largest_smaller_rank(d_out: int, d_in: int) -> int:
    """The largest rank whose factors are smaller than the dense weight; 0 if none is."""
    return (d_out * d_in - 1) // (d_out + d_in)


def match_pattern(patterns: Mapping[str, T], name: str) -> T | None:
    """The value of the first pattern that matches the end of `name`, or None."""
    for pattern, value in patterns.items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as problem:
            raise ConfigError(
                f"Pattern {pattern!r} is not a regular expression: {problem}."
            ) from problem
        if matched:
            return value
    return None


def decide(
    name: str,
    d_out: int,
    d_in: int,
    keep_ratio: float,
    keep_ratio_pattern: Mapping[str, float],
    rank_pattern: Mapping[str, int],
) -> Decision:
    """The rank of one layer (or stacked group), or why it stays dense.

    A rank asked for by `rank_pattern` is taken as it is, up to full rank, even where its factors
    are larger than the weight; a ratio never makes a layer larger.
    """
    explicit = match_pattern(rank_pattern, name)
    if explicit is not None:
        return Decision(min(explicit, d_out, d_in), "rank_pattern")
    pattern_ratio = match_pattern(keep_ratio_pattern, name)
    ratio = keep_ratio if pattern_ratio is None else pattern_ratio
    if ratio == 1:
        return Decision(None, "keep_ratio 1")  # all parameters kept: the weight itself, no error
    rank = rank_for(ratio, d_out, d_in)
    if not factors_are_smaller(rank, d_out, d_in):
        return Decision(None, f"factors of rank {rank} would not be smaller than {d_out}x{d_in}")
    return Decision(rank, f"keep_ratio {ratio:g}")
