"""Sequences of numbers in few bits each, where a number depends on the codes before its own as well.

A grid of 2 bits offers four levels. Trellis-coded quantisation (Marcellin and Fischer, 1990; for weights
QTIP, Tseng et al., arXiv 2406.11235) offers 256, of which each code chooses among four that the codes before
it left open: the level of a number is that of its *window*, the last 8 bits of the codes up to its own. For a
code of `bits` bits,

    window_t = (window_{t-1} << bits | code_t) & 255        value_t = LEVELS[bits][window_t]

Sequences bite their tails: before the first code come the last ones, so no start has to be stored, and the
first numbers fare no worse than the rest. On normally distributed numbers 2 bits in sequences of 64 have a
mean squared error of 0.078, where the best grid has 0.1175 and no code can have less than 0.0625; 3 bits
0.0204 (0.0345, 0.0156), 4 bits 0.0056 (0.0095, 0.0039).

Precision: float32; levels are worked out in float64.
"""

from functools import cache
from statistics import NormalDist

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

WINDOW = 8
"""Bits of a window."""

STATES = 1 << WINDOW

TRELLIS_BITS = (1, 2, 3, 4)
"""Bits that a code may have."""

STEPS = 64
"""Numbers that a sequence has at most."""


_PARITIES = {
    1: (71, 121, 66, 2, 87, 56, 39, 13),
    2: (53, 43, 2, 49, 12, 25, 54, 8),
    3: (9, 22, 13, 11, 7, 13, 30, 27),
    4: (9, 4, 7, 11, 4, 12, 7, 6),
}
"""Masks of the earlier bits of a window that decide the bits of its level's rank, by the bits of a code: the
best of 60 that were drawn at random, by the error on normally distributed numbers."""

_WIDTHS = {1: 0.97, 2: 1.08, 3: 1.15, 4: 1.22}
"""Standard deviations of the levels for numbers whose own is 1, by the bits of a code."""


def levels(bits: int, device: torch.device | None = None) -> Float[Tensor, "256"]:
    """The level of every window, float32: quantiles of the normal distribution, on multiples of 1/1024.

    The codes that may follow a window lead to levels far from each other: a code, with bits of the window
    before it flipped in, is the first part of its level's rank.
    """
    key = bits, torch.device("cpu") if device is None else device
    if key not in _TABLES:
        # Copied there: what makes tensors on a device at once is no operation that a stand-in for one sees.
        made = torch.tensor(_exact_levels(bits), dtype=torch.float32).to(key[1])
        if type(made) is not Tensor:  # a stand-in's own, which ends with it
            return made
        _TABLES[key] = made
    return _TABLES[key]


_TABLES: dict[tuple[int, torch.device], Tensor] = {}
"""Levels by bits and device."""


@cache
def _exact_levels(bits: int) -> list[float]:
    ordered = [NormalDist().inv_cdf((2 * rank + 1) / (2 * STATES)) for rank in range(STATES)]
    made: list[float] = []
    for window in range(STATES):
        earlier, first, behind = window >> bits, window & ((1 << bits) - 1), 0
        for place, mask in enumerate(_PARITIES[bits]):
            parity = (earlier & mask).bit_count() & 1
            if place < bits:
                first ^= parity << place
            else:
                behind |= parity << (place - bits)
        exact = ordered[first << (WINDOW - bits) | behind] * _WIDTHS[bits]
        made.append(round(exact * 1024) / 1024)
    return made


def least_steps(bits: int) -> int:
    """Numbers that a sequence has at least, so that what is left open before a code covers none twice."""
    return -(-(WINDOW - bits) // bits)


def sequences_of(rows: int) -> tuple[int, int]:
    """The number of sequences that so many numbers are cut into, and the steps of each.

    The last one is padded.
    """
    count = -(-rows // STEPS)
    return count, -(-rows // count)


def windows_of(codes: UInt8[Tensor, "*sequences steps inner"], bits: int) -> Tensor:
    """The windows of sequences of codes along the last axis but one, each biting its tail; uint8."""
    windows, shifted = codes.clone(), codes
    for shift in range(bits, WINDOW, bits):
        shifted = shifted.roll(1, dims=-2)
        windows |= shifted << shift  # what leaves the byte is no longer in the window
    return windows


def values_of(windows: UInt8[Tensor, "..."], bits: int) -> Float[Tensor, "..."]:
    """The levels of windows, float32."""
    table = levels(bits, windows.device)
    return table.index_select(0, windows.flatten().int()).view(windows.shape)
