"""A weight as integers of few bits on a grid, rounded with feedback (`emloc.linalg.rounding`).

Every layer of a group has a grid and codes of its own; what they share is the moments of their input and the
order of rounding. A convolution is rounded as a matrix of patches.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from emloc.errors import MismatchError, NumericalError
from emloc.formats.layer_format import (
    DenseLayer,
    Fitted,
    Form,
    GroupShape,
    Read,
    StoredTensor,
    budget_bytes,
    keep_ratio_of,
    tensor_bytes,
)
from emloc.layers.coded_weight import CodedWeight
from emloc.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from emloc.linalg.bit_packing import pack, packed_columns
from emloc.linalg.finite import is_finite
from emloc.linalg.gram import Moments, Side
from emloc.linalg.grid import SCALES, ZERO_BITS, choose_grid, group_count
from emloc.linalg.operator import Operator
from emloc.linalg.rounding import Feedback, squared_output
from emloc.options.compress import BITS, GROUP_SIZES, CompressConfig

SIZES: tuple[str, ...] = ("bits", "group_size")
CODES, SCALE_CODES, LARGEST, ZEROS = "codes", "scales", "largest_scales", "zeros"


class Quantized:
    """`LayerFormat`."""

    name = "quantized"
    options: tuple[str, ...] = SIZES
    size_names: tuple[str, ...] = SIZES

    def side(self, shape: GroupShape) -> Side:
        """The input's: an error is made up for by other inputs."""
        return "input"

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """The bits that were asked for; else the most, in the smallest groups, that the share allows."""
        if config.bits is not None:
            return self._form(config.bits, config.group_size or 64)
        if keep_ratio_of(shape.owner, config) == 1:
            return "keep_ratio 1"
        sizes = [config.group_size] if config.group_size else GROUP_SIZES
        budget = budget_bytes(shape, config, itemsize)
        for bits, group_size in product(sorted(BITS, reverse=True), sizes):
            form = self._form(bits, group_size)
            if tensor_bytes(shape, form, itemsize) <= budget:
                return form
        return f"{min(BITS)} bits are more than its share"

    def fit(
        self, weights: Sequence[Tensor], moments: Moments, shape: GroupShape, form: Form
    ) -> Fitted:
        """See `emloc.linalg.rounding`.

        Raises:
            NumericalError: a weight holds NaN or infinity.
        """
        bits, group_size = (form.sizes[name] for name in SIZES)
        if not all(is_finite(weight) for weight in weights):
            raise NumericalError(
                f"Layer {moments.name}: its weight holds NaN or infinity; restore the checkpoint "
                f"from its source before compressing it."
            )
        feedback, changed, whole = Feedback(moments.matrix), 0.0, 0.0
        tensors: dict[tuple[str, str], Tensor] = {}
        for layer, weight in zip(shape.layers, weights):
            grid = choose_grid(weight, moments.matrix.diagonal(), bits, group_size)
            rounded = feedback.round(weight, grid)
            changed += squared_output(rounded.error, moments.matrix)
            whole += squared_output(weight, moments.matrix)
            tensors[layer, CODES] = pack(rounded.codes, bits)
            tensors[layer, SCALE_CODES] = grid.scale_codes
            tensors[layer, LARGEST] = grid.largest.float().view(torch.int32)
            tensors[layer, ZEROS] = pack(grid.zero_codes, ZERO_BITS)
        return Fitted(tensors, {"relative_error": (changed / whole) ** 0.5 if whole > 0 else 0.0})

    def stored(self, shape: GroupShape, form: Form) -> Sequence[StoredTensor]:
        """Each layer's codes, scales and zeros."""
        return [
            StoredTensor(layer, name, size, dtype)
            for layer, d_out in zip(shape.layers, shape.d_out)
            for name, size, dtype in self._tensors(d_out, shape.d_in, form)
        ]

    def operator(self, shape: GroupShape, form: Form, layer: str, read: Read) -> Operator:
        """The codes, decoded a few rows at a time."""
        bits, group_size = (form.sizes[name] for name in SIZES)
        packed, scales = read(layer, CODES), read(layer, SCALE_CODES)
        largest, zeros = read(layer, LARGEST), read(layer, ZEROS)
        return CodedWeight(packed, scales, largest, zeros, shape.d_in, bits, group_size)

    def modules(self, layers: Sequence[DenseLayer], form: Form) -> Sequence[nn.Module]:
        """A `QuantizedLinear` or `QuantizedConv2d` for each."""
        return [self._module(layer, form) for layer in layers]

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The factorisation in float64, or the rounding of the largest layer beside its result in float32."""
        square, largest = shape.d_in**2, max(shape.d_out) * shape.d_in
        return max(20 * square, 4 * square + 22 * largest) + tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """One dense weight, and its scales and zeros."""
        groups = max(shape.d_out) * group_count(shape.d_in, form.sizes["group_size"])
        return max(shape.d_out) * shape.d_in * itemsize + 8 * groups

    def _form(self, bits: int, group_size: int) -> Form:
        return Form(self, {"bits": bits, "group_size": group_size})

    def _tensors(
        self, d_out: int, d_in: int, form: Form
    ) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        bits, groups = form.sizes["bits"], group_count(d_in, form.sizes["group_size"])
        yield CODES, (d_out, packed_columns(d_in, bits)), torch.uint8
        yield SCALE_CODES, (d_out, groups), torch.uint8
        yield LARGEST, (-(-d_out * groups // SCALES),), torch.int32
        yield ZEROS, (d_out, packed_columns(groups, ZERO_BITS)), torch.uint8

    def _module(self, layer: DenseLayer, form: Form) -> nn.Module:
        stored = {n: (size, kind) for n, size, kind in self._tensors(layer.d_out, layer.d_in, form)}
        bits, group_size = (form.sizes[name] for name in SIZES)
        if bits not in BITS or group_size < 1:
            raise MismatchError(
                f"The emulator's config gives {layer.name} {bits} bits in groups of {group_size}, which "
                f"is no format; compress the base model again."
            )
        sizes = (bits, group_size)
        if layer.convolution is not None:
            return QuantizedConv2d(layer.convolution, stored, sizes)
        return QuantizedLinear(
            layer.d_in, layer.d_out, layer.bias, stored, sizes, layer.dtype, layer.device
        )
