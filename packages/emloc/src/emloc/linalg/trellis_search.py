"""The codes with the least squared error along a trellis (`emloc.linalg.trellis`), by dynamic programming.

Every step takes a few operations on the costs of all windows. Where Numba is installed, the same sums are
compiled for CPUs (`emloc.linalg.trellis_compiled`), 10 to 40 times as fast, and where Triton is, for GPUs
(`emloc.linalg.trellis_triton`); the codes are the same.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emloc.linalg.gpu_kernels import why_not
from emloc.linalg.trellis import STATES, STEPS, TRELLIS_BITS, levels, values_of, windows_of

JUNCTION = 16
"""Numbers on either side of a sequence's ends by which the codes at its ends are chosen."""


def follow_column(
    numbers: Float[Tensor, " rows"],
    weights: Float[Tensor, " rows"],
    bits: int,
    known: bool,
    windows: UInt8[Tensor, "steps sequences"],
    values: Float[Tensor, " rows"],
) -> None:
    """Write the windows of a column of a weight, and the levels that they stand for.

    Args:
        numbers: in units of the levels, float32.
        weights: of their squared errors.
        known: whether `windows` holds some already, than which the outcome is no worse.
        windows, values: written.
    """
    compiled, (steps, count) = compiled_search(), windows.shape
    if numbers.device.type == "cpu" and compiled is not None:
        compiled.compiled_column(numbers, weights, bits, JUNCTION, known, windows, values)
        return
    room = steps * count - len(numbers)
    cut = [torch.nn.functional.pad(part, (0, room)) for part in (numbers, weights)]
    own, heavy = (part.view(count, steps).T for part in cut)
    windows.copy_(windows_of(best_codes(own, heavy, bits, windows if known else None), bits))
    values.copy_(values_of(windows, bits).T.flatten()[: len(values)])


def best_codes(
    numbers: Float[Tensor, "steps sequences"],
    weights: Float[Tensor, "steps sequences"],
    bits: int,
    known: UInt8[Tensor, "steps sequences"] | None = None,
) -> UInt8[Tensor, "steps sequences"]:
    """The codes of sequences with about the least weighted squared error.

    Args:
        numbers: at least `least_steps` of each sequence, in units of the levels; float32.
        weights: of their squared errors.
        known: windows of sequences of codes, as `windows_of` gives them, than which the outcome is no worse;
            None: where sequences are long, the ends are chosen by the numbers near them.
    """
    if len(numbers) < 2 * JUNCTION:
        path = _best_of_all_ends(numbers, weights, bits)
    elif known is None:
        joint = [torch.cat((part[-JUNCTION:], part[:JUNCTION])) for part in (numbers, weights)]
        ends = best_path(joint[0], joint[1], bits, None)[JUNCTION - 1]
        path = best_path(numbers, weights, bits, ends)
    else:  # the window in the middle is kept, and both sides of the ends are chosen together
        half = len(numbers) // 2
        turned = [part.roll(-half, dims=0) for part in (numbers, weights)]
        path = best_path(turned[0], turned[1], bits, known[half - 1]).roll(half, dims=0)
    return path & ((1 << bits) - 1)


def _best_of_all_ends(numbers: Tensor, weights: Tensor, bits: int) -> Tensor:
    """`best_path` with whatever ends are best: what is on one side of them is too near to the other side."""
    steps, count = numbers.shape
    ends = torch.arange(STATES >> bits, dtype=torch.uint8, device=numbers.device)
    every = ends.repeat_interleave(count)
    several = [part.repeat(1, len(ends)) for part in (numbers, weights)]
    paths = best_path(several[0], several[1], bits, every)
    off = values_of(paths, bits).double() - several[0]
    costs = off.square_().mul_(several[1]).sum(dim=0)
    best = costs.view(len(ends), count).argmin(dim=0)
    return paths.view(steps, len(ends), count)[:, best, torch.arange(count, device=best.device)]


def best_path(
    numbers: Float[Tensor, "steps sequences"],
    weights: Float[Tensor, "steps sequences"],
    bits: int,
    ends: UInt8[Tensor, " sequences"] | None,
) -> UInt8[Tensor, "steps sequences"]:
    """The windows of the sequences with the least weighted squared error.

    Args:
        ends: the window before the first number and of the last, but for its `bits` first bits, which may
            differ; None: any.
    """
    search, compiled = path_by_tensors, compiled_search()
    if numbers.device.type == "cpu" and compiled is not None:
        search = compiled.compiled_path
    elif torch.version.cuda is not None and numbers.is_cuda:
        with torch.cuda.device(numbers.device):  # Triton computes on the thread's
            return (_triton_search() or search)(numbers, weights, bits, ends)
    return search(numbers, weights, bits, ends)


def prepare_search(device: torch.device) -> None:
    """Compile the search, where it is of use and was not yet."""
    if device.type == "cpu" and compiled_search() is not None:
        for bits in TRELLIS_BITS:
            numbers, windows = torch.zeros(STEPS), torch.zeros(STEPS, 1, dtype=torch.uint8)
            follow_column(numbers, numbers, bits, False, windows, torch.zeros(STEPS))


Search = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
"""A function with the arguments of `best_path`."""


@cache
def _triton_search() -> Search | None:
    """The kernel; None where Triton is not installed or cannot run.

    Raises:
        RuntimeError: the GPU has not the memory to find out, or met an error before.
    """
    try:
        from emloc.linalg.trellis_triton import triton_path
    except ImportError:
        return None

    def attempt() -> None:
        for bits in TRELLIS_BITS:
            some = torch.zeros(STEPS, 1, device="cuda")
            triton_path(some, some, bits, None)

    return triton_path if why_not(attempt) is None else None


@cache
def compiled_search() -> Any:
    """The module of the compiled search; None where Numba is not installed."""
    try:
        from emloc.linalg import trellis_compiled
    except ImportError:
        return None
    return trellis_compiled


def path_by_tensors(
    numbers: Tensor, weights: Tensor, bits: int, ends: Tensor | None
) -> UInt8[Tensor, "steps sequences"]:
    """`best_path` in operations on tensors."""
    steps, count = numbers.shape
    fan, classes = 1 << bits, STATES >> bits  # a class of windows has the same ones after it
    table = levels(bits, numbers.device)[:, None, None]
    # Σ w (x − level)², less what no choice changes.
    slopes = -2 * weights * numbers
    costs = weights * table.square() + slopes * table
    least = costs.new_zeros(steps, classes, count)
    kept = None if ends is None else (ends.long() & (classes - 1))[None]
    if kept is not None:
        least[0].fill_(torch.inf).scatter_(0, kept, 0.0)
    by_class = costs.view(classes, fan, steps, count).unbind(2)
    merging = costs.view(fan, classes, steps, count)
    for here, leaving, best, following in zip(by_class, merging.unbind(2), least, least[1:]):
        here.add_(best[:, None])
        torch.amin(leaving, dim=0, out=following)
    by_class[-1].add_(least[-1][:, None])
    last, fans = costs[:, -1], torch.arange(fan, device=numbers.device)[:, None]
    places = torch.arange(STATES, device=numbers.device)[:, None].expand(-1, count)
    if kept is not None:
        places = kept + classes * fans
    window = places.gather(0, last.gather(0, places).argmin(0, keepdim=True))
    # Of the windows that a class may follow, the first with the least cost.
    first = torch.zeros(classes, steps - 1, count, dtype=torch.uint8, device=numbers.device)
    for tried in merging[:-1, :, :-1].flip(0):
        first.add_(1).mul_(tried != least[1:].transpose(0, 1))
    earlier = first.long() * classes + torch.arange(classes, device=numbers.device)[:, None, None]
    kind, kinds = window >> bits, list[Tensor]()
    for kind_before in (earlier >> bits).unbind(1)[::-1]:
        kinds.append(kind)
        kind = kind_before.gather(0, kind)
    path = earlier.gather(0, torch.stack(kinds[::-1], dim=1))[0]
    return torch.cat((path, window)).to(torch.uint8)
