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

from emloc.linalg.trellis import STATES, WINDOW, levels

LANES = 64
"""Sequences that are followed together, at most; costs of more would not stay in the processor's cache."""

NEIGHBOURS = 16
"""Sequences that one instruction may follow, at most; their number is filled up to a multiple of it."""


def compiled_path(numbers: Tensor, weights: Tensor, bits: int, ends: Tensor | None) -> Tensor:
    """`path_by_tensors`, of tensors of the CPU."""
    path = torch.empty(numbers.shape, dtype=torch.uint8)
    known = torch.empty(0, dtype=torch.uint8) if ends is None else ends
    given = (numbers.float().contiguous(), weights.float().contiguous(), levels(bits), known, path)
    _functions()[0](*(part.numpy() for part in given), bits)
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
    _functions()[1](*(part.numpy() for part in given), bits, junction, known)


@cache
def _functions() -> Any:
    """The search of sequences and that of a column, compiled.

    They are kept on disk where that can be.
    """
    try:
        return _made(numba.njit(nogil=True, cache=True))
    except RuntimeError:  # there is no folder that may be written
        return _made(numba.njit(nogil=True))


def _made(compiled: Any) -> Any:
    @compiled
    def sequences(numbers, weights, levels, ends, path, bits):
        level, square = _by_code(levels, bits)
        steps, count = numbers.shape
        own, heavy = _room(steps, count)
        given = np.full(own.shape[1], -1)
        paths = np.empty(own.shape, np.uint8)
        for start in range(0, count, LANES):
            some = min(LANES, count - start)
            own[:, :some] = numbers[:, start : start + some]
            heavy[:, :some] = weights[:, start : start + some]
            if len(ends):
                given[:some] = ends[start : start + some]
            _follow(own, heavy, level, square, given[:some], paths, bits)
            path[:, start : start + some] = paths[:, :some]

    @compiled
    def column(numbers, weights, levels, windows, values, bits, junction, known):
        level, square = _by_code(levels, bits)
        steps, count = windows.shape
        rows, half = len(numbers), steps // 2
        short = steps < 2 * junction
        turned = half if known and not short else 0  # the first step of the search
        own, heavy = _room(steps, count)
        lanes = own.shape[1]
        joint, joint_heavy = _room(2 * junction, count)
        path, joint_path = np.empty(own.shape, np.uint8), np.empty(joint.shape, np.uint8)
        tried, ends, least = (
            np.empty(own.shape, np.uint8),
            np.empty(lanes, np.int64),
            np.empty(lanes),
        )
        for start in range(0, count, LANES):
            some = min(LANES, count - start)
            for lane in range(some):
                for step in range(steps):
                    row = (start + lane) * steps + (step + turned) % steps
                    own[step, lane] = numbers[row] if row < rows else np.float32(0)
                    heavy[step, lane] = weights[row] if row < rows else np.float32(0)
            if short:
                for end in range(STATES >> bits):  # all are tried
                    ends[:] = end
                    _follow(own, heavy, level, square, ends[:some], tried, bits)
                    for lane in range(some):
                        cost = 0.0
                        for step in range(steps):
                            off = np.float64(levels[tried[step, lane]]) - np.float64(
                                own[step, lane]
                            )
                            cost += off * off * np.float64(heavy[step, lane])
                        if cost < least[lane] or end == 0:
                            least[lane] = cost
                            path[:, lane] = tried[:, lane]
            else:
                ends[:] = -1
                if known:
                    ends[:some] = windows[half - 1, start : start + some]
                else:
                    joint[:junction], joint[junction:] = own[steps - junction :], own[:junction]
                    joint_heavy[:junction] = heavy[steps - junction :]
                    joint_heavy[junction:] = heavy[:junction]
                    _follow(joint, joint_heavy, level, square, ends[:some], joint_path, bits)
                    ends[:some] = joint_path[junction - 1, :some]
                _follow(own, heavy, level, square, ends[:some], path, bits)
            for step in range(steps):
                windows[(step + turned) % steps, start : start + some] = path[step, :some]
        # Windows by the codes alone: of the last one, the first bits need not be those that it ends with.
        window, mask = np.zeros(count, np.uint8), np.uint8((1 << bits) - 1)
        for step in range(-WINDOW, steps):
            codes = windows[step % steps]
            for one in range(count):
                window[one] = (window[one] << bits) | (codes[one] & mask)
            if step >= 0:
                codes[:] = window
        for one in range(count):
            for step in range(min(steps, rows - one * steps)):
                values[one * steps + step] = levels[windows[step, one]]

    return sequences, column


@numba.njit(nogil=True)
def _room(steps, count):
    """Numbers and weights of as many sequences as are followed together, zeros."""
    lanes = min(LANES, -(-count // NEIGHBOURS) * NEIGHBOURS)
    return np.zeros((steps, lanes), np.float32), np.zeros((steps, lanes), np.float32)


@numba.njit(nogil=True)
def _by_code(levels, bits):
    """The levels and their squares, code by code."""
    fan, classes, level = 1 << bits, STATES >> bits, np.empty(STATES, np.float32)
    for code in range(fan):
        for kind in range(classes):
            level[code * classes + kind] = levels[kind * fan + code]
    return level, level * level


@numba.njit(inline="always")
def _follow(numbers, weights, level, square, ends, path, bits):
    """Write the paths of sequences that lie beside one another, steps × lanes.

    The innermost loops run over lanes and read what does not depend on them beforehand: only then do they
    become instructions for many lanes at once.

    Args:
        level, square: at `code · classes + class` those of the window `class · fan + code`.
        ends: see `path_by_tensors`, by lanes that are in use; -1: any.
    """
    fan, classes = 1 << bits, STATES >> bits
    kinds = classes // fan
    steps, lanes = numbers.shape
    least, following = (
        np.empty((classes, lanes), np.float32),
        np.empty((classes, lanes), np.float32),
    )
    back = np.empty((steps, classes, lanes), np.uint8)
    least[:] = np.float32(0)
    for kind in range(classes):
        for lane in range(len(ends)):
            open_ = ends[lane] < 0 or ends[lane] & (classes - 1) == kind
            least[kind, lane] = np.float32(0) if open_ else np.float32(np.inf)
    slope = np.empty(lanes, np.float32)
    for step in range(steps):
        weight, number = weights[step], numbers[step]
        for lane in range(lanes):
            slope[lane] = np.float32(-2) * weight[lane] * number[lane]
        if step + 1 == steps:
            break
        for later in range(kinds):
            for code in range(fan):
                best, chosen = following[later * fan + code], back[step, later * fan + code]
                at = code * classes + later
                one, one_squared, before = level[at], square[at], least[later]
                at += kinds
                two, two_squared, other = level[at], square[at], least[kinds + later]
                for lane in range(lanes):
                    first = (weight[lane] * one_squared + slope[lane] * one) + before[lane]
                    second = (weight[lane] * two_squared + slope[lane] * two) + other[lane]
                    chosen[lane] = 1 if second < first else 0
                    best[lane] = second if second < first else first
                for pair in range(2, fan, 2):
                    kind = pair * kinds + later
                    at = code * classes + kind
                    one, one_squared, before = level[at], square[at], least[kind]
                    at, kind = at + kinds, kind + kinds
                    two, two_squared, other = level[at], square[at], least[kind]
                    for lane in range(lanes):
                        so_far, choice = best[lane], chosen[lane]
                        tried = (weight[lane] * one_squared + slope[lane] * one) + before[lane]
                        choice = np.uint8(pair) if tried < so_far else choice
                        so_far = tried if tried < so_far else so_far
                        tried = (weight[lane] * two_squared + slope[lane] * two) + other[lane]
                        chosen[lane] = np.uint8(pair + 1) if tried < so_far else choice
                        best[lane] = tried if tried < so_far else so_far
        least, following = following, least
    for lane in range(len(ends)):
        window, lowest = 0, np.float32(np.inf)
        first, stride = (0, 1) if ends[lane] < 0 else (ends[lane] & (classes - 1), classes)
        for tried in range(first, STATES, stride):  # those that end as they should
            at = (tried & (fan - 1)) * classes + (tried >> bits)
            cost = weights[steps - 1, lane] * square[at] + slope[lane] * level[at]
            cost += least[tried >> bits, lane]
            if cost < lowest:
                window, lowest = tried, cost
        path[steps - 1, lane] = window
        for step in range(steps - 2, -1, -1):
            kind = window >> bits
            window = kind + classes * np.int64(back[step, kind, lane])
            path[step, lane] = window
