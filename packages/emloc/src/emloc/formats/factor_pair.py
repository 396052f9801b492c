"""Two factors of one layer, in a checkpoint: `left @ right`, plain or in few bits.

In few bits the right factor is rounded for the inputs' moments `G`, as a weight is; the left one is then
fitted anew to it, `left = W G rightᵀ (right G rightᵀ)⁻¹`, and rounded for the moments of what it reads,
`right G rightᵀ`.

Precision: as `emloc.linalg.lowrank`; the second fit in float64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from emloc.errors import MismatchError
from emloc.formats.coded_matrix import CodedMatrix, Kind, ReadName
from emloc.linalg.gram import Moments
from emloc.linalg.lowrank import factorise
from emloc.linalg.operator import Chain, Matrix, Operator
from emloc.linalg.refinement import fitted_grid
from emloc.linalg.ridged_cholesky import ridged_cholesky
from emloc.options.compress import FACTOR_BITS

LEFT, RIGHT = "left", "right"

PLAIN_BITS = 16
"""The size of a factor that is stored in the emulator's own dtype, whatever that is."""

GROUP_SIZE = 64
"""Neighbouring numbers of a factor in few bits that share a scale."""

RIDGE = 1e-6


class FactorPair(NamedTuple):
    """The sizes of two factors.

    Attributes:
        d_out, d_in: of the product.
        rank: columns of the left factor, rows of the right one.
        bits: of a number; 16: both are plain tensors.
    """

    d_out: int
    d_in: int
    rank: int
    bits: int

    @classmethod
    def known(cls, d_out: int, d_in: int, rank: int, bits: int) -> "FactorPair":
        """The sizes, if there are factors of them.

        Raises:
            MismatchError: there are none.
        """
        if bits not in FACTOR_BITS or not 1 <= rank <= min(d_out, d_in):
            raise MismatchError(
                f"The emulator's config gives layers of {d_out} outputs and {d_in} inputs factors of rank "
                f"{rank} in {bits} bits, which is not a format; compress the base model again."
            )
        return cls(d_out, d_in, rank, bits)

    @property
    def left(self) -> CodedMatrix:
        """The left factor in few bits."""
        return CodedMatrix(self.d_out, self.rank, self.bits, GROUP_SIZE, f"{LEFT}_")

    @property
    def right(self) -> CodedMatrix:
        """The right factor in few bits."""
        return CodedMatrix(self.rank, self.d_in, self.bits, GROUP_SIZE, f"{RIGHT}_")

    @property
    def plain(self) -> bool:
        """Return whether both are stored in the emulator's own dtype."""
        return self.bits == PLAIN_BITS

    def stored(self) -> Iterator[tuple[str, Kind]]:
        """The tensors of both, right first."""
        if self.plain:
            yield RIGHT, ((self.rank, self.d_in), None)
            yield LEFT, ((self.d_out, self.rank), None)
        else:
            yield from self.right.stored()
            yield from self.left.stored()

    def decoded(self, read: ReadName) -> Chain:
        """The product that stored tensors stand for."""
        left, right = self.factors(read)
        return Chain(left, right)

    def factors(self, read: ReadName) -> tuple[Operator, Operator]:
        """Left and right."""
        if self.plain:
            return Matrix(read(LEFT)), Matrix(read(RIGHT))
        return self.left.decoded(read), self.right.decoded(read)

    def fit(self, weight: Tensor, moments: Moments) -> dict[str, Tensor]:
        """The stored tensors of factors that are best for a weight, d_out × d_in, under moments of inputs.

        Raises:
            NumericalError: the weight holds NaN or infinity.
        """
        factors = factorise(weight, moments, self.rank)
        if self.plain:
            return {RIGHT: factors.right, LEFT: factors.left}
        grid, codes, _ = fitted_grid(factors.right.float(), moments, self.bits, GROUP_SIZE)
        tensors = self.right.encoded(grid, codes)
        right = grid.values(codes)
        read = moments.matrix.float() @ right.T
        square = (right @ read).double()
        left = _solved(square, (weight.float() @ read).double()).float()
        seen = Moments.of_matrix("input", moments.name, square.float(), moments.tokens)
        grid, codes, _ = fitted_grid(left, seen, self.bits, GROUP_SIZE)
        return {**tensors, **self.left.encoded(grid, codes)}


def _solved(square: Tensor, sides: Tensor) -> Tensor:
    """`sides @ square⁻¹`, with a ridge that grows until there is an inverse."""
    root, _ = ridged_cholesky(square.clone(), RIDGE * float(square.diagonal().mean()) or 1.0)
    return torch.cholesky_solve(sides.T, root).T
