"""Grids of a weight that is rounded: `w ≈ scale · (code − zero)`, by row and group of inputs.

A group is so many neighbouring inputs of one row; the last group of a row may be shorter. Scales and zeros
are stored small. A scale is a code of 8 bits times the largest scale of 256 neighbouring ones (rows first),
like the double quantisation of NF4 (QLoRA, arXiv 2305.14314); code 0 is a group of zeros. A zero is a code of
4 bits, in fifteenths of the grid's width, so that grids of 2 and 3 bits may lie between two levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

SCALES = 256
"""Neighbouring scales that share their largest one."""

ZERO_BITS = 4

ELEMENTS = {"cpu": 1 << 17}
"""Weights that are tried on a grid at a time, by the kind of device, so that they stay in the cache."""

ELEMENTS_ELSEWHERE = 1 << 24

SHRINKS = tuple(1 - 0.05 * step for step in range(13))
"""Shares of a group's range that are tried as the grid's; outliers beyond it are clipped."""


SMALLEST_SCALE = 1e-36
"""Scales below it are zero; a 255th of it, the least scale beside it, still has an inverse in float32."""


@dataclass(frozen=True)
class Grid:
    """The grid of every group, in the form that is stored.

    Attributes:
        bits: of a code.
        group_size: inputs of a group.
        columns: inputs of a row.
        scale_codes: rows × groups.
        largest: the largest scale of each `SCALES` neighbouring ones.
        zero_codes: rows × groups, below 16.
    """

    bits: int
    group_size: int
    columns: int
    scale_codes: UInt8[Tensor, "rows groups"]
    largest: Float[Tensor, " blocks"]
    zero_codes: UInt8[Tensor, "rows groups"]

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def scales(self) -> Float[Tensor, "rows groups"]:
        """Scales, float32."""
        return decoded_scales(self.scale_codes, self.largest)

    @property
    def zeros(self) -> Float[Tensor, "rows groups"]:
        """Zeros in units of a code, float32."""
        return decoded_zeros(self.zero_codes, self.bits)

    @property
    def units(self) -> Float[Tensor, "rows groups"]:
        """The scales of code 1, float32."""
        return decoded_scales(torch.ones_like(self.scale_codes), self.largest)

    def by_group(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scales, their inverses (of 0: 0), and zeros, each rows × groups, float32."""
        scales = self.scales
        return scales, torch.where(scales > 0, 1 / scales, 0.0), self.zeros

    def values(self, codes: Tensor) -> Float[Tensor, "rows columns"]:
        """The weight that rows of codes stand for, float32."""
        values = codes.to(torch.float32, copy=True).sub_(self._by_column(self.zeros))
        return values.mul_(self._by_column(self.scales))

    def _by_column(self, part: Tensor) -> Tensor:
        return part.repeat_interleave(self.group_size, dim=1)[:, : self.columns]


def group_count(columns: int, group_size: int) -> int:
    """Groups of a row."""
    return -(-columns // group_size)


def decoded_scales(codes: Tensor, largest: Tensor) -> Tensor:
    """Scales of rows × groups, float32, from their codes and the largest of each block."""
    flat = codes.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % SCALES)).view(-1, SCALES)
    scales = blocks.float() * (largest.float()[:, None] / 255)
    return scales.flatten()[: flat.numel()].view(codes.shape)


def decoded_zeros(codes: Tensor, bits: int) -> Tensor:
    """Zeros in units of a code, float32."""
    return codes.float() * (((1 << bits) - 1) / ((1 << ZERO_BITS) - 1))


def choose_grid(
    weight: Float[Tensor, "rows columns"],
    importance: Float[Tensor, " columns"],
    bits: int,
    group_size: int,
) -> Grid:
    """The grid with the least squared error when every weight is rounded to its nearest level.

    The ends of each group's range, and zero, lie on the widest grid that is tried; narrower ones clip.

    Args:
        importance: weights of the squared errors by input, such as the diagonal of the inputs' moments.
    """
    scales, zeros, _ = _search(weight, importance, bits, group_size)
    codes, largest = encode_scales(scales)
    return Grid(bits, group_size, weight.shape[1], codes, largest, zeros.to(torch.uint8))


def grid_error(
    weight: Float[Tensor, "rows columns"],
    importance: Float[Tensor, " columns"],
    bits: int,
    group_size: int,
) -> float:
    """The weighted squared error of about the grid that `choose_grid` gives, from a coarser search."""
    return float(_search(weight, importance, bits, group_size, SHRINKS[::3])[2].double().sum())


def _search(
    weight: Tensor,
    importance: Tensor,
    bits: int,
    group_size: int,
    shrinks: Sequence[float] = SHRINKS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, codes of zeros and squared errors (float64), each rows × groups."""
    columns = weight.shape[1]
    count = group_count(columns, group_size)
    room = count * group_size - columns
    # Squares of tiny or huge numbers leave float32's range: errors are compared in units of their own.
    unit = importance.double().amax().clamp(min=torch.finfo(torch.float64).tiny)
    weights = torch.nn.functional.pad((importance.double() / unit).float(), (0, room))
    weights = weights.view(count, group_size, 1)
    searched: list[tuple[Tensor, Tensor, Tensor]] = []
    step = max(1, ELEMENTS.get(weight.device.type, ELEMENTS_ELSEWHERE) // columns)
    for part in weight.split(step):
        padded = torch.nn.functional.pad(part.float(), (0, room))
        grouped = padded.view(len(part), count, group_size)
        searched.append(_search_rows(grouped, weights, bits, shrinks))
    scales, zeros, errors = (torch.cat(parts) for parts in zip(*searched))
    return scales, zeros, errors * unit


def _search_rows(
    grouped: Tensor, weights: Tensor, bits: int, shrinks: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for some rows × groups × inputs of a group."""
    low = grouped.amin(dim=2).clamp(max=0)
    high = grouped.amax(dim=2).clamp(min=0)
    levels = (1 << bits) - 1
    widest = high / levels - low / levels
    widest = torch.where(widest < SMALLEST_SCALE, 0.0, widest)
    best: Tensor | None = None
    scales = zeros = low
    for shrink in shrinks:
        scale = widest * shrink
        zero = _zero_codes(low * shrink, scale, bits)
        error = _squared_error(grouped, weights, scale, zero, bits).mul_(shrink**2)
        better = None if best is None else error < best
        best = error if best is None else torch.minimum(best, error)
        scales = scale if better is None else torch.where(better, scale, scales)
        zeros = zero if better is None else torch.where(better, zero, zeros)
    assert best is not None
    return scales, zeros, best * widest.double().square()


def encode_scales(scales: Float[Tensor, "rows groups"]) -> tuple[Tensor, Tensor]:
    """Scales as codes of 8 bits and the largest of each block, float32.

    No scale but 0 gets the code 0.
    """
    flat = torch.nn.functional.pad(scales.flatten(), (0, -scales.numel() % SCALES))
    blocks = flat.view(-1, SCALES)
    largest = blocks.amax(dim=1)
    unit = torch.where(largest > 0, largest / 255, 1.0)[:, None]
    codes = (blocks / unit).round().clamp(0, 255)
    codes = torch.where((blocks > 0) & (codes < 1), 1.0, codes)
    return codes.to(torch.uint8).flatten()[: scales.numel()].view(scales.shape), largest


def _zero_codes(low: Tensor, scale: Tensor, bits: int) -> Tensor:
    unit = ((1 << bits) - 1) / ((1 << ZERO_BITS) - 1)
    steps = torch.where(scale > 0, -low / scale, 0.0)
    return (steps / unit).round().clamp(0, (1 << ZERO_BITS) - 1)


def _squared_error(
    grouped: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """The weighted squared error of each group in units of its scale squared, rows × groups."""
    inverse = torch.where(scale > 0, 1 / scale, 0.0)[..., None]
    places = (grouped * inverse).add_(decoded_zeros(zero, bits)[..., None])
    codes = places.round().clamp_(0, (1 << bits) - 1)
    off = codes.sub_(places).square_()
    # One small product per group adds up what is off in it.
    return torch.bmm(off.transpose(0, 1), weights)[..., 0].T
