"""The search along a trellis as one kernel for GPUs; imported only where Triton is installed.

The sums and their order are those of `emloc.linalg.trellis_search.path_by_tensors`; so are the windows that
come out.
"""

# pyright: basic, reportMissingImports=false, reportUntypedFunctionDecorator=false, reportIndexIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

from emloc.linalg.trellis import STATES, levels


def triton_path(numbers: Tensor, weights: Tensor, bits: int, ends: Tensor | None) -> Tensor:
    """`path_by_tensors`, of tensors of a GPU."""
    steps, count = numbers.shape
    fan, classes = 1 << bits, STATES >> bits
    path = torch.empty(steps, count, dtype=torch.uint8, device=numbers.device)
    chosen = torch.empty(steps, count, classes, dtype=torch.uint8, device=numbers.device)
    known = torch.zeros_like(path[0]) if ends is None else ends
    _search[(count,)](
        numbers.float().contiguous(), weights.float().contiguous(), levels(bits, numbers.device),
        known, chosen, path, count, STEPS=steps,
        CLOSED=ends is not None, BITS=bits, FAN=fan, CLASSES=classes, LATER=classes // fan,
        enable_fp_fusion=False,
    )  # fmt: skip
    return path


@triton.jit
def _search(
    numbers,
    weights,
    levels,
    ends,
    chosen,
    path,
    count,
    STEPS: tl.constexpr,
    CLOSED: tl.constexpr,
    BITS: tl.constexpr,
    FAN: tl.constexpr,
    CLASSES: tl.constexpr,
    LATER: tl.constexpr,
):
    """Write the windows of one sequence.

    Costs lie code by code: that of the window `class · FAN + code` is at `code, class`.

    Args:
        numbers, weights, path: steps × count.
        chosen: the first code of the best window that each class follows, steps × count × CLASSES.
        CLOSED: whether `ends` holds.
    """
    sequence = tl.program_id(0)
    classes, codes = tl.arange(0, CLASSES), tl.arange(0, FAN)
    windows = codes[:, None] + classes[None, :] * FAN
    level = tl.load(levels + windows)
    square = level * level
    least = tl.zeros([CLASSES], dtype=tl.float32)
    kept = tl.load(ends + sequence).to(tl.int32) & (CLASSES - 1)
    if CLOSED:
        least = tl.where(classes == kept, 0.0, float("inf"))
    following = tl.arange(0, LATER)[None, :] * FAN + codes[:, None]
    costs = square
    for step in range(STEPS):
        weight = tl.load(weights + step * count + sequence)
        slope = -2 * weight * tl.load(numbers + step * count + sequence)
        costs = (weight * square + slope * level) + least[None, :]
        by_first = tl.reshape(costs, (FAN, FAN, LATER))
        best, first = tl.min(by_first, axis=1, return_indices=True)
        least = tl.reshape(tl.trans(best), (CLASSES,))
        place = (step * count + sequence) * CLASSES + following
        tl.store(chosen + place, first.to(tl.uint8))
    if CLOSED:
        costs = tl.where((windows & (CLASSES - 1)) == kept, costs, float("inf"))
    lowest = tl.min(tl.min(costs, axis=1), axis=0)
    window = tl.min(tl.min(tl.where(costs == lowest, windows, 256), axis=1), axis=0)
    tl.store(path + (STEPS - 1) * count + sequence, window.to(tl.uint8))
    tl.debug_barrier()  # what other threads stored is read from here on
    for back in range(1, STEPS):
        step = STEPS - 1 - back
        kind = window >> BITS
        first = tl.load(chosen + (step * count + sequence) * CLASSES + kind).to(tl.int32)
        window = kind + CLASSES * first
        tl.store(path + step * count + sequence, window.to(tl.uint8))
