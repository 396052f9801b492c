"""A weight in few bits plus a product of two factors: `W_e = Q + left @ right`.

The factors are the best for what rounding lost, `W − Q`, under the moments of the inputs, as a weight's own
are (`emloc.linalg.lowrank`; QERA's exact solution, arXiv 2410.06040, without an inverse). Or the other order:
the leading directions of W are kept, and what is left is rounded (SRR, arXiv 2602.02001), which may alternate
(CALDERA, arXiv 2405.18886). Of all that was made, the nearest to W under the moments is taken.

Rank has its price: 32 in 16 bits are 0.25 bits per weight at a width of 4096, and 1.8 at 576.
"""

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from emloc.formats.coded_layers import coded_module, grid_within, layer_tensors, refuse_unknown_grid
from emloc.formats.coded_matrix import CodedMatrix, Kind, ReadName
from emloc.formats.factor_pair import PLAIN_BITS, FactorPair
from emloc.formats.layer_format import (
    DenseLayer,
    Fitted,
    Form,
    GroupShape,
    Read,
    StoredTensor,
    tensor_bytes,
)
from emloc.formats.low_rank_bytes import factorise_bytes
from emloc.linalg.finite import refuse_not_finite
from emloc.linalg.gram import Moments, Side
from emloc.linalg.grid import choose_grid, group_count
from emloc.linalg.operator import Operator, Sum
from emloc.linalg.refinement import round_and_refine
from emloc.linalg.rounding import Feedback, squared_output
from emloc.options.compress import CompressConfig

BITS, GROUP, RANK, FACTOR_BITS = "bits", "group_size", "residual_rank", "factor_bits"
SIZES: tuple[str, ...] = (BITS, GROUP, RANK, FACTOR_BITS)

DEFAULT_RANK = 16

ALTERNATIONS = 2
"""Rounds of rounding and factorising anew, after leading directions were kept first."""


class QuantizedResidual:
    """`LayerFormat`."""

    name = "quantized_residual"
    options: tuple[str, ...] = SIZES
    size_names: tuple[str, ...] = SIZES

    def side(self, shape: GroupShape) -> Side:
        """The input's, as rounding needs."""
        return "input"

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """Bits as of `quantized`, with what the rank that was asked for takes."""
        rank = min(config.residual_rank or DEFAULT_RANK, *shape.d_out, shape.d_in)
        number = config.factor_bits or PLAIN_BITS

        def form_of(bits: int, group_size: int) -> Form:
            return Form(self, dict(zip(SIZES, (bits, group_size, rank, number))))

        return grid_within(shape, config, itemsize, form_of)

    def fit(
        self, weights: Sequence[Tensor], moments: Moments, shape: GroupShape, form: Form
    ) -> Fitted:
        """The better of both orders, layer by layer.

        Raises:
            NumericalError: a weight holds NaN or infinity.
        """
        refuse_not_finite(moments.name, weights)
        feedback, changed, whole = Feedback.of(moments), 0.0, 0.0
        tensors: dict[tuple[str, str], Tensor] = {}
        for layer, weight in zip(shape.layers, weights):
            cost, stored = min(
                self._attempts(weight, moments, feedback, form), key=lambda attempt: attempt[0]
            )
            changed, whole = changed + cost, whole + squared_output(weight, moments.matrix)
            tensors.update({(layer, name): tensor for name, tensor in stored.items()})
        return Fitted(tensors, {"relative_error": (changed / whole) ** 0.5 if whole > 0 else 0.0})

    def _attempts(
        self, weight: Tensor, moments: Moments, feedback: Feedback, form: Form
    ) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Squared changes of the outputs and the tensors: rounding first, then leading directions first."""
        codes_of, pair = self._parts(weight.shape[0], weight.shape[1], form)
        weight = weight.float()

        def rounded(target: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            diagonal = moments.matrix.diagonal()
            grid = choose_grid(target, diagonal, codes_of.bits, codes_of.group_size)
            grid, codes = round_and_refine(target, moments.matrix, feedback, grid)
            return codes_of.encoded(grid, codes), grid.values(codes)

        def factored(target: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            stored = pair.fit(target, moments, feedback)
            return stored, pair.operator(stored.__getitem__).dense(weight.dtype)

        for rounds, leading_first in ((1, False), (ALTERNATIONS, True)):
            added = factored(weight)[1] if leading_first else None
            for _ in range(rounds):
                codes, grid_part = rounded(weight if added is None else weight - added)
                factors, added = factored(weight - grid_part)
                left = weight - grid_part - added
                yield squared_output(left, moments.matrix), {**codes, **factors}

    def stored(self, shape: GroupShape, form: Form) -> Sequence[StoredTensor]:
        """Each layer's codes, scales and zeros, and its factors."""
        return layer_tensors(shape, lambda d_out: self._tensors(d_out, shape.d_in, form))

    def operator(self, shape: GroupShape, form: Form, layer: str, read: Read) -> Operator:
        """The sum of both."""
        codes, pair = self._parts(shape.d_out[shape.layers.index(layer)], shape.d_in, form)
        return _Both(codes, pair).decoded(lambda name: read(layer, name))

    def modules(self, layers: Sequence[DenseLayer], form: Form) -> Sequence[nn.Module]:
        """A `QuantizedLinear` or `QuantizedConv2d` for each.

        Raises:
            MismatchError: there is no grid of these sizes.
        """
        refuse_unknown_grid(layers[0].name, form.sizes[BITS], form.sizes[GROUP])
        return [
            coded_module(
                layer,
                self._tensors(layer.d_out, layer.d_in, form),
                _Both(*self._parts(layer.d_out, layer.d_in, form)).decoded,
                form,
            )
            for layer in layers
        ]

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The carried errors, what is left of the largest layer and both of its parts, and the greater of
        rounding and factorising.
        """
        square, largest = shape.d_in**2, max(shape.d_out) * shape.d_in
        one = GroupShape(shape.layers[:1], (max(shape.d_out),), shape.d_in, shape.kernel)
        factorising = factorise_bytes("input", one, form.sizes[RANK], 4)
        held = 4 * square + 16 * largest + tensor_bytes(shape, form, itemsize)
        return held + max(16 * square, 26 * largest, factorising)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """Two dense weights, and scales and zeros."""
        groups = max(shape.d_out) * group_count(shape.d_in, form.sizes[GROUP])
        return 2 * max(shape.d_out) * shape.d_in * itemsize + 8 * groups

    def _parts(self, d_out: int, d_in: int, form: Form) -> tuple[CodedMatrix, FactorPair]:
        bits, group_size, rank, number = (form.sizes[name] for name in SIZES)
        return CodedMatrix(d_out, d_in, bits, group_size), FactorPair(d_out, d_in, rank, number)

    def _tensors(self, d_out: int, d_in: int, form: Form) -> Iterable[tuple[str, Kind]]:
        codes, pair = self._parts(d_out, d_in, form)
        return [*codes.stored(), *pair.stored()]


class _Both:
    """Decodes a sum."""

    def __init__(self, codes: CodedMatrix, pair: FactorPair) -> None:
        self._codes, self._pair = codes, pair

    def decoded(self, read: ReadName) -> Operator:
        """The weight."""
        return Sum(self._codes.decoded(read), self._pair.operator(read))


QUANTIZED_RESIDUAL = QuantizedResidual()
