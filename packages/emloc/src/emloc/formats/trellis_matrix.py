"""A matrix along a trellis in a checkpoint: sizes, fit and tensors (`emloc.layers.trellis_weight`)."""

from collections.abc import Iterator, Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from emloc.errors import MismatchError
from emloc.formats.coded_matrix import CODES, LARGEST, SCALE_CODES, Kind, ReadName
from emloc.layers.trellis_weight import TrellisWeight
from emloc.linalg.bit_packing import pack, packed_columns
from emloc.linalg.gram import Moments
from emloc.linalg.grid import SCALES, group_count
from emloc.linalg.trellis import TRELLIS_BITS, least_steps, sequences_of
from emloc.linalg.trellis_rounding import fitted_trellis
from emloc.linalg.trellis_search import compiled_search
from emloc.machine.progress import warn


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

    @classmethod
    def known(cls, rows: int, columns: int, bits: int, group_size: int) -> "TrellisMatrix":
        """The sizes, if there are codes of them.

        Raises:
            MismatchError: there are none.
        """
        if bits not in TRELLIS_BITS or group_size < 1 or rows < least_steps(bits):
            raise MismatchError(
                f"The emulator's config gives layers of {rows} outputs {bits} bits in groups of "
                f"{group_size} along a trellis, which is not a format; compress the base model again."
            )
        return cls(rows, columns, bits, group_size)

    def stored(self) -> Iterator[tuple[str, Kind]]:
        """The tensors by name, in the order of `TrellisWeight`."""
        groups = group_count(self.columns, self.group_size)
        padded = prod(sequences_of(self.rows))
        yield CODES, ((padded, packed_columns(self.columns, self.bits)), torch.uint8)
        yield SCALE_CODES, ((self.rows, groups), torch.uint8)
        yield LARGEST, ((-(-self.rows * groups // SCALES),), torch.int32)

    def fit(self, weight: Tensor, moments: Moments) -> tuple[dict[str, Tensor], float]:
        """The tensors of a matrix that is fitted to a weight, and the squared change of the outputs."""
        advise(weight.device)
        rounded = fitted_trellis(weight, moments, self.bits, self.group_size)
        tensors = {
            CODES: pack(rounded.codes, self.bits),
            SCALE_CODES: rounded.scales.codes,
            LARGEST: rounded.scales.largest.float().view(torch.int32),
        }
        return tensors, rounded.cost

    def decoded(self, read: ReadName) -> TrellisWeight:
        """The matrix that stored tensors stand for."""
        packed, scale_codes, largest = (read(name) for name, _ in self.stored())
        return TrellisWeight(packed, scale_codes, largest, self.columns, self.bits, self.group_size)


def trellis_bits_of(d_out: Sequence[int]) -> list[int]:
    """The bits for which layers of so many outputs each have enough of them."""
    return [bits for bits in TRELLIS_BITS if min(d_out) >= least_steps(bits)]


def advise(device: torch.device) -> None:
    """Say once what would make finding the codes faster."""
    if device.type == "cpu" and compiled_search() is None:
        _say_numba()


@cache
def _say_numba() -> None:
    warn(
        "codes along a trellis are found 10 to 40 times as fast with Numba, which is not installed: "
        "pip install 'emloc[numba]'"
    )
