"""bitsandbytes' NF4, as QLoRA holds a base: the data have no say in it.

4.13 bits per weight. Moments serve to tell the error alone.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from emloc.formats.coded_layers import coded_module, layer_tensors
from emloc.formats.coded_matrix import Kind, ReadName
from emloc.formats.layer_format import (
    DenseLayer,
    Fitted,
    Form,
    GroupShape,
    Read,
    StoredTensor,
    budget_bytes,
    tensor_bytes,
)
from emloc.integrations.bitsandbytes.nf4_weight import (
    BLOCK,
    SCALES,
    NF4Weight,
    bitsandbytes,
    quantise,
)
from emloc.linalg.finite import refuse_not_finite
from emloc.linalg.gram import Moments, Side
from emloc.linalg.operator import Operator
from emloc.linalg.rounding import squared_output
from emloc.options.compress import CompressConfig

CODES, ABSMAX, NESTED = "codes", "absmax", "nested"


class NF4:
    """`LayerFormat`."""

    name = "nf4"
    options: tuple[str, ...] = ()
    size_names: tuple[str, ...] = ()

    def side(self, shape: GroupShape) -> Side:
        """The input's, which tells the error of a weight."""
        return "input"

    def decide(self, shape: GroupShape, config: CompressConfig, itemsize: int) -> Form | str:
        """NF4, whatever the budget; where the budget was given and is less, the reason to stay dense.

        Raises:
            DependencyError: bitsandbytes is not installed.
        """
        bitsandbytes()
        form = Form(self)
        given = {"keep_ratio", "bits_per_weight"} & config.model_fields_set
        if given and tensor_bytes(shape, form, itemsize) > budget_bytes(shape, config, itemsize):
            return "4.13 bits are more than its share"
        return form

    def fit(
        self, weights: Sequence[Tensor], moments: Moments, shape: GroupShape, form: Form
    ) -> Fitted:
        """Each weight to its nearest code.

        Raises:
            NumericalError: a weight holds NaN or infinity.
        """
        refuse_not_finite(moments.name, weights)
        changed = whole = 0.0
        tensors: dict[tuple[str, str], Tensor] = {}
        for layer, weight in zip(shape.layers, weights):
            parts: dict[str, Tensor] = dict(zip((CODES, ABSMAX, NESTED), quantise(weight)))
            rounded = _decoded(len(weight), shape.d_in, parts.__getitem__).dense(torch.float32)
            changed += squared_output(weight.float() - rounded, moments.matrix)
            whole += squared_output(weight, moments.matrix)
            tensors.update({(layer, name): tensor for name, tensor in parts.items()})
        return Fitted(tensors, {"relative_error": (changed / whole) ** 0.5 if whole > 0 else 0.0})

    def stored(self, shape: GroupShape, form: Form) -> Sequence[StoredTensor]:
        """Each layer's codes, and its scales on two levels."""
        return layer_tensors(shape, lambda d_out: _tensors(d_out * shape.d_in))

    def operator(self, shape: GroupShape, form: Form, layer: str, read: Read) -> Operator:
        """The codes, decoded whole."""
        d_out = shape.d_out[shape.layers.index(layer)]
        return _decoded(d_out, shape.d_in, lambda name: read(layer, name))

    def modules(self, layers: Sequence[DenseLayer], form: Form) -> Sequence[nn.Module]:
        """A `QuantizedLinear` or `QuantizedConv2d` for each.

        Raises:
            DependencyError: bitsandbytes is not installed.
        """
        bitsandbytes()
        return [
            coded_module(layer, _tensors(layer.d_out * layer.d_in), _Decode(layer), form)
            for layer in layers
        ]

    def fitting_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """The largest weight and its decoded values in float32, beside the result."""
        return 12 * max(shape.d_out) * shape.d_in + tensor_bytes(shape, form, itemsize)

    def running_bytes(self, shape: GroupShape, form: Form, itemsize: int) -> int:
        """One dense weight, and its scales."""
        numel = max(shape.d_out) * shape.d_in
        return numel * itemsize + 8 * -(-numel // BLOCK)


class _Decode:
    """Decodes the tensors of one layer."""

    def __init__(self, layer: DenseLayer) -> None:
        self._sizes = layer.d_out, layer.d_in

    def __call__(self, read: ReadName) -> Operator:
        return _decoded(*self._sizes, read)


def _decoded(d_out: int, d_in: int, read: ReadName) -> NF4Weight:
    return NF4Weight(read(CODES), read(ABSMAX), read(NESTED), (d_out, d_in))


def _tensors(numel: int) -> Iterator[tuple[str, Kind]]:
    blocks = -(-numel // BLOCK)
    yield CODES, ((-(-numel // 2),), torch.uint8)
    yield ABSMAX, ((blocks,), torch.uint8)
    yield NESTED, ((-(-blocks // SCALES) + 1,), torch.int32)


NF4_FORMAT = NF4()
