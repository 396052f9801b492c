"""The forms among which `format=auto` chooses for each layer."""

from itertools import product

from emloc.formats.layer_format import Form, GroupShape, tensor_bytes
from emloc.formats.quantized import QUANTIZED
from emloc.formats.trellis import TRELLIS
from emloc.formats.trellis_residual import GROUP_SIZE, TRELLIS_RESIDUAL

FINEST = (8, 128)
"""Bits and group size of the grid beyond what a trellis has."""

RANKS = (8, 16, 32)
"""Ranks of residuals; their factors have 8 bits."""

LEAST_WIDTH = 8
"""Times that a layer is wider than the rank of its residual, at least: in narrower ones bits buy more."""


def menu_of(shape: GroupShape, itemsize: int) -> list[Form]:
    """Forms of one layer, smaller than its dense weight, in the order of their bytes.

    A trellis has about half of the error of a grid of as many bytes, and groups of fewer than 128 inputs
    lower it less than as many bytes do in bits. Products of factors alone are far behind both.

    Args:
        itemsize: bytes of an element of the dense weight.
    """
    offered = TRELLIS.bits_of(shape)
    forms = [TRELLIS.form(bits, GROUP_SIZE) for bits in offered]
    forms.append(QUANTIZED.form(*FINEST))
    ranks = [rank for rank in RANKS if LEAST_WIDTH * rank <= min(*shape.d_out, shape.d_in)]
    forms += [TRELLIS_RESIDUAL.form(*sizes, 8) for sizes in product(offered, (GROUP_SIZE,), ranks)]
    dense = shape.numel * itemsize
    sizes = [(tensor_bytes(shape, form, itemsize), form) for form in forms]
    return [form for size, form in sorted(sizes, key=lambda pair: pair[0]) if size < dense]
