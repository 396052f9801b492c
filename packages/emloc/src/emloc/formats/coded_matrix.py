"""A matrix of few bits in a checkpoint: the tensors of its grid and codes (`emloc.layers.coded_weight`)."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from emloc.layers.coded_weight import CodedWeight
from emloc.linalg.bit_packing import pack, packed_columns
from emloc.linalg.grid import SCALES, ZERO_BITS, Grid, group_count

CODES, SCALE_CODES, LARGEST, ZEROS = "codes", "scales", "largest_scales", "zeros"

ReadName = Callable[[str], Tensor]
"""Gives a stored tensor of one layer by its name."""

Kind = tuple[tuple[int, ...], torch.dtype | None]
"""Shape and dtype of a stored tensor."""


class CodedMatrix(NamedTuple):
    """The sizes of a matrix in few bits.

    Attributes:
        rows, columns: of the matrix.
        bits: of a code.
        group_size: columns that share a scale.
        prefix: of its tensors' names.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    prefix: str = ""

    def stored(self) -> Iterator[tuple[str, Kind]]:
        """The tensors by name, in the order of `CodedWeight`."""
        groups = group_count(self.columns, self.group_size)
        yield (
            self.prefix + CODES,
            ((self.rows, packed_columns(self.columns, self.bits)), torch.uint8),
        )
        yield self.prefix + SCALE_CODES, ((self.rows, groups), torch.uint8)
        yield self.prefix + LARGEST, ((-(-self.rows * groups // SCALES),), torch.int32)
        yield self.prefix + ZEROS, ((self.rows, packed_columns(groups, ZERO_BITS)), torch.uint8)

    def encoded(self, grid: Grid, codes: Tensor) -> dict[str, Tensor]:
        """The tensors of a matrix that was rounded to `grid`."""
        return {
            self.prefix + CODES: pack(codes, self.bits),
            self.prefix + SCALE_CODES: grid.scale_codes,
            self.prefix + LARGEST: grid.largest.float().view(torch.int32),
            self.prefix + ZEROS: pack(grid.zero_codes, ZERO_BITS),
        }

    def decoded(self, read: ReadName) -> CodedWeight:
        """The matrix that stored tensors stand for."""
        packed, scale_codes, largest, zero_codes = (read(name) for name, _ in self.stored())
        return CodedWeight(
            packed, scale_codes, largest, zero_codes, self.columns, self.bits, self.group_size
        )
