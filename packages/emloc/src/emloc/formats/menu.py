"""The forms among which `format=auto` chooses for each layer."""

from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.quantized import QUANTIZED
from emloc.formats.trellis import GROUP_SIZE, TRELLIS

FINEST = (8, 128)
"""Bits and group size of the grid beyond what a trellis has."""


def menu_of(shape: GroupShape, itemsize: int) -> list[Form]:
    """Forms of one layer, smaller than its dense weight, in the order of their bytes.

    A trellis has about half of the error of a grid of as many bytes, and groups of fewer than 128 inputs
    lower it less than as many bytes do in bits.

    Args:
        itemsize: bytes of an element of the dense weight.
    """
    forms = [TRELLIS.form(bits, GROUP_SIZE) for bits in TRELLIS.bits_of(shape)]
    forms.append(QUANTIZED.form(*FINEST))
    dense = shape.numel * itemsize
    sizes = [(tensor_bytes(shape, form, itemsize), form) for form in forms]
    return [form for size, form in sorted(sizes, key=lambda pair: pair[0]) if size < dense]
