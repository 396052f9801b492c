"""The search along a trellis, compiled; imported only where Numba is installed.

The sums and their order are those of `emloc.linalg.trellis_search.path_by_tensors`; so are the windows that
come out.
"""

# pyright: basic, reportMissingImports=false, reportMissingTypeStubs=false
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from emloc.linalg.trellis import STATES, levels


def compiled_path(numbers: Tensor, weights: Tensor, bits: int, ends: Tensor | None) -> Tensor:
    """`path_by_tensors`, of tensors of the CPU."""
    path = torch.empty(numbers.shape, dtype=torch.uint8)
    known = torch.empty(0, dtype=torch.uint8) if ends is None else ends
    given = (numbers.float().contiguous(), weights.float().contiguous(), levels(bits), known, path)
    _functions(bits)[0](*(part.numpy() for part in given))
    return path


def compiled_column(
    numbers: Tensor,
    weights: Tensor,
    bits: int,
    junction: int,
    known: bool,
    windows: Tensor,
    values: Tensor,
) -> None:
    """The windows and the levels of one column of a weight, all in one call.

    Args:
        numbers, weights: by rows, float32.
        junction: see `emloc.linalg.trellis_search`; of sequences that are not twice as long, all ends are
            tried.
        known: whether `windows` is to be improved.
        windows: steps × sequences; written.
        values: by rows; written.
    """
    given = (numbers, weights, levels(bits), windows, values)
    _functions(bits)[1](*(part.numpy() for part in given), junction, known)


@cache
def _functions(bits: int) -> Any:
    """The search of sequences and that of a column, compiled for codes of so many bits.

    They are kept on disk where that can be.
    """
    try:
        return _made(bits, numba.njit(nogil=True, cache=True))
    except RuntimeError:  # there is no folder that may be written
        return _made(bits, numba.njit(nogil=True))


def _made(bits: int, compiled: Any) -> Any:
    """The functions; what they enclose are whole numbers, by which Numba knows them again."""
    BITS, FAN, CLASSES = bits, 1 << bits, STATES >> bits

    @compiled
    def sequences(numbers, weights, levels, ends, path):
        level, square = _by_code(levels, FAN, CLASSES)
        for one in range(numbers.shape[1]):
            end = np.int64(ends[one]) if len(ends) else np.int64(-1)
            own, heavy = numbers[:, one].copy(), weights[:, one].copy()
            _follow(own, heavy, level, square, end, path[:, one], BITS, FAN, CLASSES)

    @compiled
    def column(numbers, weights, levels, windows, values, junction, known):
        level, square = _by_code(levels, FAN, CLASSES)
        steps, count = windows.shape
        rows, half = len(numbers), steps // 2
        own, heavy = np.empty(steps, np.float32), np.empty(steps, np.float32)
        joint, joint_heavy = np.empty(2 * junction, np.float32), np.empty(2 * junction, np.float32)
        path, joint_path = np.empty(steps, np.uint8), np.empty(2 * junction, np.uint8)
        short, tried = steps < 2 * junction, np.empty(steps, np.uint8)
        for one in range(count):
            start = one * steps
            turned = half if known and not short else 0  # the first step of the search
            for step in range(steps):
                row = start + (step + turned) % steps
                own[step] = numbers[row] if row < rows else np.float32(0)
                heavy[step] = weights[row] if row < rows else np.float32(0)
            first, last = np.int64(0), np.int64(CLASSES)  # the ends that are tried
            if known and not short:
                first = np.int64(windows[half - 1, one])
            elif not short:
                for step in range(2 * junction):
                    place = (step - junction) % steps
                    joint[step], joint_heavy[step] = own[place], heavy[place]
                any_end = np.int64(-1)
                _follow(joint, joint_heavy, level, square, any_end, joint_path, BITS, FAN, CLASSES)
                first = np.int64(joint_path[junction - 1])
            if not short:
                last = first + 1
            least = np.inf
            for end in range(first, last):
                _follow(own, heavy, level, square, end, tried, BITS, FAN, CLASSES)
                cost = 0.0
                for step in range(steps):
                    off = np.float64(levels[tried[step]]) - np.float64(own[step])
                    cost += off * off * np.float64(heavy[step])
                if cost < least or end == first:
                    least = cost
                    path[:] = tried
            for step in range(steps):
                windows[(step + turned) % steps, one] = path[step]
        # Windows by the codes alone: of the last one, the first bits need not be those that it ends with.
        for one in range(count):
            window = np.int64(0)
            for step in range(2 * steps):
                at = step % steps
                window = ((window << BITS) | (windows[at, one] & (FAN - 1))) & (STATES - 1)
                if step >= steps:
                    windows[at, one] = window
                    if one * steps + at < rows:
                        values[one * steps + at] = levels[window]

    return sequences, column


@numba.njit(inline="always")
def _by_code(levels, FAN, CLASSES):
    """The levels and their squares, code by code."""
    level = np.empty(STATES, np.float32)
    for code in range(FAN):
        for kind in range(CLASSES):
            level[code * CLASSES + kind] = levels[kind * FAN + code]
    return level, level * level


@numba.njit(inline="always")
def _follow(numbers, weights, level, square, ends, path, BITS, FAN, CLASSES):
    """Write the path of one sequence.

    Costs lie code by code, so that loops run over neighbouring numbers: that of a window is at
    `code · CLASSES + class`, of which the window is `class · FAN + code`.

    Args:
        ends: see `path_by_tensors`; -1: any.
        BITS, FAN, CLASSES: constants where this is inlined, so that loops are unrolled.
    """
    LATER = CLASSES // FAN
    steps = len(numbers)
    least, costs = np.zeros(CLASSES, np.float32), np.empty(STATES, np.float32)
    back = np.empty((steps, CLASSES), np.uint8)
    if ends >= 0:
        least[:] = np.float32(np.inf)
        least[ends & (CLASSES - 1)] = np.float32(0)
    for step in range(steps):
        weight = weights[step]
        slope = np.float32(-2) * weight * numbers[step]
        for code in range(FAN):
            for kind in range(CLASSES):
                at = code * CLASSES + kind
                costs[at] = (weight * square[at] + slope * level[at]) + least[kind]
        if step + 1 == steps:
            break
        for code in range(FAN):
            for later in range(LATER):
                best, chosen = costs[code * CLASSES + later], np.uint8(0)
                for first in range(1, FAN):
                    tried = costs[code * CLASSES + first * LATER + later]
                    chosen = np.uint8(first) if tried < best else chosen
                    best = tried if tried < best else best
                least[later * FAN + code] = best
                back[step, later * FAN + code] = chosen
    window, best = 0, np.float32(np.inf)
    for tried in range(STATES):
        cost = costs[(tried & (FAN - 1)) * CLASSES + (tried >> BITS)]
        fits = ends < 0 or (tried ^ ends) & (CLASSES - 1) == 0
        if fits and cost < best:
            window, best = tried, cost
    path[steps - 1] = window
    for step in range(steps - 2, -1, -1):
        kind = window >> BITS
        window = kind + CLASSES * np.int64(back[step, kind])
        path[step] = window
