"""A matrix along a trellis in a checkpoint: its tensors (`emloc.layers.trellis_weight`)."""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from emloc.formats.coded_matrix import CODES, LARGEST, SCALE_CODES, Kind, ReadName
from emloc.layers.trellis_weight import TrellisWeight
from emloc.linalg.bit_packing import pack, packed_columns
from emloc.linalg.grid import SCALES, group_count
from emloc.linalg.trellis import sequences_of
from emloc.linalg.trellis_rounding import TrellisRounded


class TrellisMatrix(NamedTuple):
    """The sizes of a matrix along a trellis.

    Attributes:
        rows, columns: of the matrix.
        bits: of a code.
        group_size: columns that share a scale.
    """

    rows: int
    columns: int
    bits: int
    group_size: int

    def stored(self) -> Iterator[tuple[str, Kind]]:
        """The tensors by name, in the order of `TrellisWeight`."""
        groups = group_count(self.columns, self.group_size)
        padded = prod(sequences_of(self.rows))
        yield CODES, ((padded, packed_columns(self.columns, self.bits)), torch.uint8)
        yield SCALE_CODES, ((self.rows, groups), torch.uint8)
        yield LARGEST, ((-(-self.rows * groups // SCALES),), torch.int32)

    def encoded(self, rounded: TrellisRounded) -> dict[str, Tensor]:
        """The tensors of a matrix that was rounded so."""
        return {
            CODES: pack(rounded.codes, self.bits),
            SCALE_CODES: rounded.scales.codes,
            LARGEST: rounded.scales.largest.float().view(torch.int32),
        }

    def decoded(self, read: ReadName) -> TrellisWeight:
        """The matrix that stored tensors stand for."""
        packed, scale_codes, largest = (read(name) for name, _ in self.stored())
        return TrellisWeight(packed, scale_codes, largest, self.columns, self.bits, self.group_size)
