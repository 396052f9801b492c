"""A weight as integers of few bits on a grid, rounded with feedback (`emloc.linalg.rounding`).

Every layer of a group has a grid and codes of its own; what they share is the moments of their input and the
order of rounding. A convolution is rounded as a matrix of patches.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from emloc.formats.coded_layers import coded_module, grid_within, layer_tensors, refuse_unknown_grid
from emloc.formats.coded_matrix import CodedMatrix
from emloc.formats.layer_format import (
    DenseLayer,
    Fitted,
    Form,
    GroupShape,
    Read,
    StoredTensor,
    tensor_bytes,
)
from emloc.formats.quantized_residual import QUANTIZED_RESIDUAL
from emloc.linalg.finite import refuse_not_finite
from emloc.linalg.gram import Moments, Side
from emloc.linalg.grid import choose_grid, group_count
from emloc.linalg.operator import Operator
from emloc.linalg.refinement import round_and_refine
from emloc.linalg.rounding import Feedback, squared_output
from emloc.options.compress import CompressConfig

SIZES: tuple[str, ...] = ("bits", "group_size")


class Quantized:
    """`LayerFormat`."""

    name = "quantized"
    options: tuple[str, ...] = (*SIZES, "residual_rank", "factor_bits")
    size_names: tuple[str, ...] = SIZES

    def side(self, shape: GroupShape) -> Side:
        """The input's: an error is made up for by other inputs."""
        return "input"

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """The bits that were asked for; else the most, in the smallest groups, that the share allows."""
        if config.residual_rank:
            return QUANTIZED_RESIDUAL.decide(shape, config, itemsize)
        return grid_within(shape, config, itemsize, self._form)

    def fit(
        self, weights: Sequence[Tensor], moments: Moments, shape: GroupShape, form: Form
    ) -> Fitted:
        """See `emloc.linalg.rounding`.

        Raises:
            NumericalError: a weight holds NaN or infinity.
        """
        refuse_not_finite(moments.name, weights)
        feedback, changed, whole = Feedback.of(moments), 0.0, 0.0
        tensors: dict[tuple[str, str], Tensor] = {}
        for layer, weight in zip(shape.layers, weights):
            matrix = self.matrix(len(weight), shape.d_in, form)
            grid = choose_grid(weight, moments.matrix.diagonal(), matrix.bits, matrix.group_size)
            grid, codes = round_and_refine(weight, moments.matrix, feedback, grid)
            changed += squared_output(weight.float() - grid.values(codes), moments.matrix)
            whole += squared_output(weight, moments.matrix)
            encoded = matrix.encoded(grid, codes)
            tensors.update({(layer, name): tensor for name, tensor in encoded.items()})
        return Fitted(tensors, {"relative_error": (changed / whole) ** 0.5 if whole > 0 else 0.0})

    def stored(self, shape: GroupShape, form: Form) -> Sequence[StoredTensor]:
        """Each layer's codes, scales and zeros."""
        return layer_tensors(shape, lambda d_out: self.matrix(d_out, shape.d_in, form).stored())

    def operator(self, shape: GroupShape, form: Form, layer: str, read: Read) -> Operator:
        """The codes, decoded a few rows at a time."""
        d_out = shape.d_out[shape.layers.index(layer)]
        return self.matrix(d_out, shape.d_in, form).decoded(lambda name: read(layer, name))

    def modules(self, layers: Sequence[DenseLayer], form: Form) -> Sequence[nn.Module]:
        """A `QuantizedLinear` or `QuantizedConv2d` for each.

        Raises:
            MismatchError: there is no grid of these sizes.
        """
        refuse_unknown_grid(layers[0].name, *(form.sizes[name] for name in SIZES))
        matrices = [self.matrix(layer.d_out, layer.d_in, form) for layer in layers]
        return [
            coded_module(layer, matrix.stored(), matrix.decoded, form)
            for layer, matrix in zip(layers, matrices)
        ]

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The factorisation in float64, or the rounding of the largest layer beside its result in float32."""
        square, largest = shape.d_in**2, max(shape.d_out) * shape.d_in
        return max(20 * square, 4 * square + 22 * largest) + tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """One dense weight, and its scales and zeros."""
        groups = max(shape.d_out) * group_count(shape.d_in, form.sizes["group_size"])
        return max(shape.d_out) * shape.d_in * itemsize + 8 * groups

    def matrix(self, d_out: int, d_in: int, form: Form) -> CodedMatrix:
        """The sizes of one layer's codes."""
        return CodedMatrix(d_out, d_in, *(form.sizes[name] for name in SIZES))

    def _form(self, bits: int, group_size: int) -> Form:
        return Form(self, {"bits": bits, "group_size": group_size})


QUANTIZED = Quantized()
