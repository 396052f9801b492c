"""The parts that formats in few bits have in common: tensors of every layer by name, and modules."""

from collections.abc import Callable, Iterable
from itertools import product

from torch import nn

from emloc.errors import MismatchError
from emloc.formats.coded_matrix import Kind
from emloc.formats.layer_format import (
    DenseLayer,
    Form,
    GroupShape,
    StoredTensor,
    budget_bytes,
    keep_ratio_of,
    tensor_bytes,
)
from emloc.layers.quantized_layers import Decode, QuantizedConv2d, QuantizedLinear
from emloc.options.compress import BITS, GROUP_SIZES, CompressConfig

GROUP_SIZE = 64
"""Inputs of a group where only bits are given."""


def grid_within(
    shape: GroupShape, config: CompressConfig, itemsize: int, form_of: Callable[[int, int], Form]
) -> Form | str:
    """The form of the bits that were asked for, or of the most, in the smallest groups, within the budget.

    Args:
        form_of: gives the form of some bits and group size.

    Returns:
        The reason to stay dense, if nothing is within the budget or the budget is all.
    """
    if config.bits is not None:
        return form_of(config.bits, config.group_size or GROUP_SIZE)
    if keep_ratio_of(shape.owner, config, itemsize) == 1:
        return "keep_ratio 1"
    sizes = [config.group_size] if config.group_size else GROUP_SIZES
    budget = budget_bytes(shape, config, itemsize)
    for bits, group_size in product(sorted(BITS, reverse=True), sizes):
        form = form_of(bits, group_size)
        if tensor_bytes(shape, form, itemsize) <= budget:
            return form
    return f"{min(BITS)} bits are more than its share"


def refuse_unknown_grid(layer: str, bits: int, group_size: int) -> None:
    """Refuse sizes that no compression writes.

    Raises:
        MismatchError: names the layer.
    """
    if bits not in BITS or group_size < 1:
        raise MismatchError(
            f"The emulator's config gives {layer} {bits} bits in groups of {group_size}, which "
            f"is no format; compress the base model again."
        )


def layer_tensors(
    shape: GroupShape, stored: Callable[[int], Iterable[tuple[str, Kind]]]
) -> list[StoredTensor]:
    """The tensors of a group whose layers share none.

    Args:
        stored: those of a layer with so many outputs.
    """
    return [
        StoredTensor(layer, name, size, dtype)
        for layer, d_out in zip(shape.layers, shape.d_out)
        for name, (size, dtype) in stored(d_out)
    ]


def coded_module(
    layer: DenseLayer, stored: Iterable[tuple[str, Kind]], decode: Decode, form: Form
) -> nn.Module:
    """An empty module that holds these tensors and multiplies by the weight that they stand for."""
    tensors = dict(stored)
    shown = ", ".join(f"{name}={value}" for name, value in form.sizes.items())
    if layer.convolution is not None:
        return QuantizedConv2d(layer.convolution, tensors, decode, shown)
    return QuantizedLinear(
        layer.d_in, layer.d_out, layer.bias, tensors, decode, shown, layer.dtype, layer.device
    )
