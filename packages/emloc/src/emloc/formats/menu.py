"""The forms among which `format=auto` chooses for each layer."""

from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.quantized import QUANTIZED
from emloc.formats.quantized_residual import QUANTIZED_RESIDUAL, SIZES

GRIDS = ((2, 128), (2, 64), (3, 128), (3, 64), (4, 128), (4, 64), (8, 128))
"""Bits and group sizes."""

REFERENCE = (3, 64)
"""The grid at which it is measured how much a block minds a layer's error."""

RESIDUAL = (2, 64, 16, 8)
"""Bits, group size, rank and bits of the factors of the one form with a residual."""

RESIDUAL_BITS = 0.2
"""The form with a residual is tried where its factors take less than that per weight: in wide layers."""


def menu_of(shape: GroupShape, itemsize: int) -> list[Form]:
    """Forms of one layer, smaller than its dense weight, in the order of their bytes.

    Args:
        itemsize: bytes of an element of the dense weight.
    """
    forms = [grid_form(*grid) for grid in GRIDS]
    residual = Form(QUANTIZED_RESIDUAL, dict(zip(SIZES, RESIDUAL)))
    if min(shape.rows, shape.d_in) > RESIDUAL[2]:
        plain = tensor_bytes(shape, grid_form(*RESIDUAL[:2]), itemsize)
        added = tensor_bytes(shape, residual, itemsize) - plain
        forms += [residual] if 8 * added < RESIDUAL_BITS * shape.numel else []
    dense = shape.numel * itemsize
    sizes = [(tensor_bytes(shape, form, itemsize), form) for form in forms]
    return [form for size, form in sorted(sizes, key=lambda pair: pair[0]) if size < dense]


def grid_form(bits: int, group_size: int) -> Form:
    """A form of `quantized`."""
    return Form(QUANTIZED, {"bits": bits, "group_size": group_size})
