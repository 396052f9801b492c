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


def compiled_path(numbers: Tensor, weights: Tensor, bits: int, ends: Tensor | None) -> Tensor:
    """`path_by_tensors`, of tensors of the CPU."""
    path = np.empty(tuple(numbers.shape), np.uint8)
    closed = ends is not None
    known = ends if closed else torch.zeros(numbers.shape[1], dtype=torch.uint8)
    parts = (numbers.float().contiguous(), weights.float().contiguous(), levels(bits), known)
    _search(bits)(*(part.numpy() for part in parts), closed, path)
    return torch.from_numpy(path)


@cache
def _search(bits: int) -> Any:
    """The search for codes of so many bits, compiled at its first call and kept on disk where that can be."""
    try:
        return numba.njit(nogil=True, cache=True)(_written(bits))
    except RuntimeError:  # there is no folder that may be written
        return numba.njit(nogil=True)(_written(bits))


def _written(bits: int) -> Any:
    """The search, with constants by which loops are unrolled.

    Costs lie code by code, so that loops run over neighbouring numbers: that of a window is at
    `code · CLASSES + class`, of which the window is `class · FAN + code`.
    """
    FAN, CLASSES = 1 << bits, STATES >> bits
    LATER = CLASSES // FAN
    BITS, ALL = bits, 1 << WINDOW

    def search(numbers, weights, levels, ends, closed, path):
        steps, count = numbers.shape
        level, square = np.empty(ALL, np.float32), np.empty(ALL, np.float32)
        for code in range(FAN):
            for kind in range(CLASSES):
                level[code * CLASSES + kind] = levels[kind * FAN + code]
        square[:] = level * level
        least, costs = np.empty(CLASSES, np.float32), np.empty(ALL, np.float32)
        back = np.empty((steps, CLASSES), np.uint8)
        for sequence in range(count):
            least[:] = np.float32(np.inf) if closed else np.float32(0)
            if closed:
                least[ends[sequence] & (CLASSES - 1)] = np.float32(0)
            for step in range(steps):
                weight = weights[step, sequence]
                slope = np.float32(-2) * weight * numbers[step, sequence]
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
            for tried in range(ALL):
                cost = costs[(tried & (FAN - 1)) * CLASSES + (tried >> BITS)]
                fits = not closed or (tried ^ ends[sequence]) & (CLASSES - 1) == 0
                if fits and cost < best:
                    window, best = tried, cost
            path[steps - 1, sequence] = window
            for step in range(steps - 2, -1, -1):
                kind = window >> BITS
                window = kind + CLASSES * np.int64(back[step, kind])
                path[step, sequence] = window

    return search
