"""The forms among which `format=auto` chooses for each layer."""

from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.quantized import QUANTIZED

GRIDS = ((2, 128), (2, 64), (3, 128), (3, 64), (4, 128), (4, 64), (8, 128))
"""Bits and group sizes."""

REFERENCE = (3, 64)
"""The grid at which it is measured how much a block minds a layer's error."""


def menu_of(shape: GroupShape, itemsize: int) -> list[Form]:
    """Forms of one layer, smaller than its dense weight, in the order of their bytes.

    Args:
        itemsize: bytes of an element of the dense weight.
    """
    forms = [grid_form(*grid) for grid in GRIDS]
    dense = shape.numel * itemsize
    sizes = [(tensor_bytes(shape, form, itemsize), form) for form in forms]
    return [form for size, form in sorted(sizes, key=lambda pair: pair[0]) if size < dense]


def grid_form(bits: int, group_size: int) -> Form:
    """A form of `quantized`."""
    return Form(QUANTIZED, {"bits": bits, "group_size": group_size})
