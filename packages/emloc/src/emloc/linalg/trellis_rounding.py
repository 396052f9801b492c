"""A weight in codes along a trellis (`emloc.linalg.trellis`), chosen so that a layer's outputs change little.

The sequences run down the outputs, so that all numbers of a sequence belong to one input: whatever stands for
them, later inputs make up for its error as for that of a grid (`emloc.linalg.rounding`), row by row. Then, as
on a grid, scales and codes are improved one input at a time (`emloc.linalg.refinement`).

Numbers of a row and a group of inputs share a scale. On SmolLM2-135M 2 bits in groups of 128 (2.07 bits per
weight) have half of the squared error of a grid of 2 bits in groups of 64 (2.23), and 3 bits as well.

Precision: float32.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from emloc.linalg.gram import Moments
from emloc.linalg.grid import (
    ELEMENTS,
    ELEMENTS_ELSEWHERE,
    SMALLEST_SCALE,
    decoded_scales,
    encode_scales,
    group_count,
)
from emloc.linalg.refinement import ScaleSteps, fitted_bytes, improve
from emloc.linalg.rounding import BLOCK, Feedback
from emloc.linalg.trellis import levels, sequences_of
from emloc.linalg.trellis_search import follow_column

ERRORS = {1: 0.299, 2: 0.078, 3: 0.0204, 4: 0.0056}
"""Mean squared errors of normally distributed numbers, by the bits of a code."""

WIDENINGS = tuple(1.2**step for step in range(8))
"""Ratios that are tried of a scale to the root mean square of its group; the largest reaches about any
number of a group of 128."""

LEAST_WEIGHT = 0.1
"""Share of the mean scale that an output counts with at least, however small its weights are: others of its
sequence would have them lost. (Where all count alike, 2 bits of SmolLM2-135M are at a divergence of 1.09
instead of 0.70.)"""

FARTHEST = 1e3
"""Numbers farther from zero, in units of the levels, are no more off than they would be from here."""


class TrellisScales(NamedTuple):
    """The scales of every group, in the form that is stored; see `emloc.linalg.grid.Grid`."""

    group_size: int
    codes: UInt8[Tensor, "rows groups"]
    largest: Float[Tensor, " blocks"]

    @property
    def units(self) -> Float[Tensor, "rows groups"]:
        """The scales of code 1, float32."""
        return decoded_scales(torch.ones_like(self.codes), self.largest)


@dataclass(frozen=True)
class TrellisRounded:
    """A weight along a trellis.

    Attributes:
        codes: padded rows × columns; row `s · steps + t` is step t of sequence s.
        cost: `‖(W − W_e) X‖_F²` on the inputs of the moments, without the ridge.
    """

    scales: TrellisScales
    codes: UInt8[Tensor, "padded columns"]
    cost: float


def fitted_trellis(
    weight: Float[Tensor, "rows columns"], moments: Moments, bits: int, group_size: int
) -> TrellisRounded:
    """Scales and codes: chosen with feedback, then improved.

    Args:
        weight: of at least `least_steps` rows.
        moments: of the inputs.
    """
    weight, ridge = weight.float(), Feedback.of(moments).ridge
    scales, paths = _carried(weight, moments, bits, group_size)
    steps = ScaleSteps(scales.codes, scales.units, group_size)
    errors = weight.T - paths.values
    cost = improve(errors, moments.matrix, ridge, steps, paths)
    return TrellisRounded(scales._replace(codes=steps.coded), paths.stored, cost)


def trellis_values(
    weight: Float[Tensor, "rows columns"], moments: Moments, bits: int, group_size: int
) -> Float[Tensor, "rows columns"]:
    """The weight along a trellis, chosen with feedback and not improved, float32."""
    return _carried(weight, moments, bits, group_size)[1].values.T


def _carried(
    weight: Tensor, moments: Moments, bits: int, group_size: int
) -> tuple[TrellisScales, "_Paths"]:
    """Scales, and codes that make up for the errors of those before them."""
    scales = choose_scales(weight, moments.matrix.diagonal(), bits, group_size)
    paths = _Paths(weight, scales, bits)
    Feedback.of(moments).carry(weight, paths.nearest)
    return scales, paths


def fitted_trellis_bytes(rows: int, columns: int) -> int:
    """The most that `fitted_trellis` holds beside weight and moments, with the shares that are carried on."""
    block = 12 * min(BLOCK, columns) * rows + (1 << 16)
    return fitted_bytes(rows, columns) + 5 * rows * columns + block


def choose_scales(
    weight: Float[Tensor, "rows columns"],
    importance: Float[Tensor, " columns"],
    bits: int,
    group_size: int,
) -> TrellisScales:
    """The scales with about the least squared error, `trellis_error` of it."""
    scales, _ = _search(weight, importance, bits, group_size)
    codes, largest = encode_scales(scales)
    return TrellisScales(group_size, codes, largest)


def trellis_error(
    weight: Float[Tensor, "rows columns"],
    importance: Float[Tensor, " columns"],
    bits: int,
    group_size: int,
) -> float:
    """About the weighted squared error along a trellis, without following it.

    Numbers within the levels lose what normally distributed ones do; those beyond, the way to the outermost.
    """
    return float(_search(weight, importance, bits, group_size)[1].double().sum())


def _search(
    weight: Tensor, importance: Tensor, bits: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Scales and squared errors (float64), each rows × groups."""
    columns = weight.shape[1]
    count = group_count(columns, group_size)
    room = count * group_size - columns
    unit = importance.double().amax().clamp(min=torch.finfo(torch.float64).tiny)
    weights = torch.nn.functional.pad((importance.double() / unit).float(), (0, room))
    weights = weights.view(count, group_size)
    reach = float(levels(bits).abs().amax())
    step = max(1, ELEMENTS.get(weight.device.type, ELEMENTS_ELSEWHERE) // columns)
    searched: list[tuple[Tensor, Tensor]] = []
    for part in weight.split(step):
        padded = torch.nn.functional.pad(part.float(), (0, room))
        sizes = padded.view(len(part), count, group_size).abs()
        widest = sizes.amax(dim=2)
        widest = torch.where(widest < SMALLEST_SCALE, 0.0, widest)
        sizes = sizes * torch.where(widest > 0, 1 / widest, 0.0)[..., None]
        # The last group may be shorter: what it is padded with is no number of it.
        numbers = torch.full((count,), float(group_size), device=weight.device)
        numbers[-1] -= room
        root = (sizes.square().sum(dim=2) / numbers).sqrt()
        within = ERRORS[bits] * weights.sum(dim=1)
        best, scales = torch.full_like(root, torch.inf), root
        for widening in WIDENINGS:
            scale = root * widening
            beyond = (sizes - (scale * reach)[..., None]).clamp_(min=0).square_()
            error = within * scale.square() + (beyond * weights).sum(dim=2)
            scales = torch.where(error < best, scale, scales)
            best = torch.minimum(best, error)
        searched.append((scales * widest, best * widest.double().square()))
    scales, errors = (torch.cat(parts) for parts in zip(*searched))
    return scales, errors * unit


class _Paths:
    """`Places`: the codes of all inputs along a trellis.

    Args:
        weight: rows × columns.
    """

    def __init__(self, weight: Tensor, scales: TrellisScales, bits: int) -> None:
        self._rows, columns = weight.shape
        self._count, self._steps = sequences_of(self._rows)
        self._bits, self._size = bits, scales.group_size
        self._scales = decoded_scales(scales.codes, scales.largest).T.contiguous()
        self._units = list(map(_Units.of, self._scales))
        shape = columns, self._steps, self._count
        self._windows = torch.zeros(shape, dtype=torch.uint8, device=weight.device)
        self._places = torch.zeros(columns, self._rows, device=weight.device)

    @property
    def values(self) -> Float[Tensor, "columns rows"]:
        """The weight that the codes stand for, before any scale moved."""
        return self._places * self._scales.repeat_interleave(self._size, dim=0)[: len(self._places)]

    @property
    def stored(self) -> UInt8[Tensor, "padded columns"]:
        """The codes by rows."""
        codes = self._windows & ((1 << self._bits) - 1)
        return codes.permute(2, 1, 0).reshape(-1, len(codes)).contiguous()

    def nearest(self, column: int, target: Tensor) -> Tensor:
        """Choose what stands for a column, and return it, rows."""
        group = column // self._size
        self._follow(column, target, self._units[group], False)
        return self._places[column] * self._scales[group]

    def offsets(self, columns: slice, group: int) -> Tensor:
        """See `Places`."""
        return self._places[columns].clone()

    def move(self, columns: slice, scale: Tensor, slopes: Tensor, square: Tensor) -> Tensor:
        """See `Places`; no sequence becomes worse."""
        units, shifts = _Units.of(scale), torch.zeros_like(slopes)
        for k, curvature in enumerate(square.diagonal().tolist()):
            if curvature <= 0:
                continue
            column, before = columns.start + k, self._places[columns.start + k].clone()
            target = torch.add(before * scale, slopes[k], alpha=1 / curvature)
            self._follow(column, target, units, True)
            torch.sub(self._places[column], before, out=shifts[k]).mul_(scale)
            slopes[k + 1 :].addr_(square[k + 1 :, k], shifts[k], alpha=-1)
        return shifts

    def _follow(self, column: int, target: Tensor, units: "_Units", known: bool) -> None:
        """Choose the windows of a column for what its weights should come to."""
        numbers = (target * units.inverse).clamp_(-FARTHEST, FARTHEST)
        windows, places = self._windows[column], self._places[column]
        follow_column(numbers, units.weights, self._bits, known, windows, places)


class _Units(NamedTuple):
    """The units of a group by rows: inverse scales (of 0: 0), and the weights of squared errors in them."""

    inverse: Tensor
    weights: Tensor

    @classmethod
    def of(cls, scale: Tensor) -> "_Units":
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        relative = scale / scale.amax().clamp(min=SMALLEST_SCALE)
        there = relative.sum() / (scale > 0).sum().clamp(min=1)
        weights = relative.maximum(LEAST_WEIGHT * there).square()
        return cls(inverse, torch.where(scale > 0, weights, 0.0))
