"""A weight in few bits plus a product of two factors: `W_e = Q + left @ right`.

The factors are the best for what rounding lost, `W − Q`, under the moments of the inputs, as a weight's own
are (`emloc.linalg.lowrank`; QERA's exact solution, arXiv 2410.06040, without an inverse). Or the other order:
the leading directions of W are kept, and what is left is rounded (SRR, arXiv 2602.02001), which may alternate
(CALDERA, arXiv 2405.18886). Of all that was made, the nearest to W under the moments is taken.

Rank has its price: 32 in 16 bits are 0.25 bits per weight at a width of 4096, and 1.8 at 576.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from emloc.errors import ConfigError
from emloc.formats.coded_layers import (
    GRID_BITS,
    GROUP_SIZE,
    LayerByLayer,
    Layout,
    grid_within,
    refuse_unknown_grid,
)
from emloc.formats.coded_matrix import CodedMatrix, Kind, ReadName
from emloc.formats.factor_pair import PLAIN_BITS, FactorPair
from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.low_rank_bytes import factorise_bytes
from emloc.linalg.gram import Moments
from emloc.linalg.grid import group_count
from emloc.linalg.operator import Operator, Sum
from emloc.linalg.refinement import fitted_bytes, fitted_grid
from emloc.linalg.rounding import squared_change
from emloc.options.compress import CompressConfig

BITS, GROUP, RANK, FACTOR_BITS = "bits", "group_size", "residual_rank", "factor_bits"
SIZES: tuple[str, ...] = (BITS, GROUP, RANK, FACTOR_BITS)

DEFAULT_RANK = 16

ALTERNATIONS = 2
"""Rounds of rounding and factorising anew, after leading directions were kept first."""


class QuantizedResidual(LayerByLayer):
    """`LayerFormat`, and `WeighsRows`: its factors do, and the choice of an order; rounding need not."""

    name = "quantized_residual"
    without = "quantized"
    usual_group = GROUP_SIZE
    known_bits: tuple[int, ...] = GRID_BITS
    weighs_rows = True
    options: tuple[str, ...] = SIZES
    size_names: tuple[str, ...] = SIZES

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """Bits as of `quantized`, with what the rank that was asked for takes.

        Raises:
            ConfigError: a rank of 0, which is another format's, or bits that codes cannot have.
        """
        if config.bits is not None and config.bits not in self.known_bits:
            bits = ", ".join(map(str, self.known_bits))
            raise ConfigError(
                f"format={self.name} has codes of {bits} bits, not {config.bits}; pass one of them."
            )
        if config.residual_rank == 0:
            raise ConfigError(
                f"format={self.name} has a residual; without one (residual_rank=0) pass "
                f"format={self.without}."
            )
        rank = min(config.residual_rank or DEFAULT_RANK, *shape.d_out, shape.d_in)
        number = config.factor_bits or PLAIN_BITS

        def form_of(bits: int, group_size: int) -> Form:
            return self.form(bits, group_size, rank, number)

        offered = self.bits_of(shape)
        return grid_within(shape, config, itemsize, form_of, offered, self.usual_group)

    def form(self, bits: int, group_size: int, rank: int, factor_bits: int) -> Form:
        """A form of these sizes."""
        return Form(self, dict(zip(SIZES, (bits, group_size, rank, factor_bits))))

    def bits_of(self, shape: GroupShape) -> Sequence[int]:
        """The bits that codes of such layers may have."""
        return GRID_BITS

    def layout(self, d_out: int, d_in: int, form: Form) -> "CodesAndFactors":
        """Codes, scales and zeros, and the factors.

        Raises:
            MismatchError: there are no codes or no factors of these sizes.
        """
        bits, group_size, rank, number = (form.sizes[name] for name in SIZES)
        codes = self.codes_of(d_out, d_in, bits, group_size)
        return CodesAndFactors(codes, FactorPair.known(d_out, d_in, rank, number))

    def codes_of(self, d_out: int, d_in: int, bits: int, group_size: int) -> Layout:
        """The tensors of the codes.

        Raises:
            MismatchError: there is no grid of these sizes.
        """
        refuse_unknown_grid(bits, group_size)
        return CodedMatrix(d_out, d_in, bits, group_size)

    def round(
        self, target: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """The tensors of codes that are fitted to a weight, and what they stand for, float32."""
        rows, columns = target.shape
        matrix = CodedMatrix(rows, columns, form.sizes[BITS], form.sizes[GROUP])
        grid, codes, _ = fitted_grid(target, moments, matrix.bits, matrix.group_size)
        return matrix.encoded(grid, codes), grid.values(codes)

    def fit_layer(
        self, weight: Tensor, moments: Moments, form: Form
    ) -> tuple[Mapping[str, Tensor], float]:
        """The better of both orders."""
        layout = self.layout(weight.shape[0], weight.shape[1], form)
        attempts = self._attempts(weight.float(), moments, form, layout.pair)
        return min(attempts, key=lambda attempt: attempt[1])

    def _attempts(
        self, weight: Tensor, moments: Moments, form: Form, pair: FactorPair
    ) -> Iterator[tuple[dict[str, Tensor], float]]:
        """Tensors and squared changes of the outputs: rounding first, then leading directions first."""

        def factored(target: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            stored = pair.fit(target, moments)
            return stored, pair.decoded(stored.__getitem__).dense(target.dtype)

        for rounds, leading_first in ((1, False), (ALTERNATIONS, True)):
            added = factored(weight)[1] if leading_first else None
            for _ in range(rounds):
                target = weight if added is None else weight - added
                codes, on_grid = self.round(target, moments, form)
                factors, added = factored(weight - on_grid)
                cost = squared_change(weight - on_grid - added, moments)
                yield {**codes, **factors}, (cost if math.isfinite(cost) else math.inf)

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """Shares that are carried on, what is left of the largest layer and both of its parts, and the
        greater of rounding and factorising.
        """
        square, rows = shape.d_in**2, max(shape.d_out)
        one = GroupShape(shape.layers[:1], (max(shape.d_out),), shape.d_in, shape.kernel)
        factorising = factorise_bytes("input", one, form.sizes[RANK], 4)
        held = 4 * square + 16 * rows * shape.d_in + tensor_bytes(shape, form, itemsize)
        return held + max(fitted_bytes(rows, shape.d_in) - 4 * square, factorising)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """Two dense weights, and scales and zeros."""
        groups = max(shape.d_out) * group_count(shape.d_in, form.sizes[GROUP])
        return 2 * max(shape.d_out) * shape.d_in * itemsize + 8 * groups


class CodesAndFactors(NamedTuple):
    """The tensors of a sum."""

    codes: Layout
    pair: FactorPair

    def stored(self) -> Iterator[tuple[str, Kind]]:
        """The tensors of the codes, then the factors'."""
        yield from self.codes.stored()
        yield from self.pair.stored()

    def decoded(self, read: ReadName) -> Operator:
        """The weight."""
        return Sum(self.codes.decoded(read), self.pair.decoded(read))


QUANTIZED_RESIDUAL = QuantizedResidual()
