"""Blocks' matrices that wait in few bits: rounded once, to the nearest levels, without calibration data.

So the frozen model is one in few bits, as QLoRA's is, and a LoRA learns beside its rounded weights.
"""

import torch
from torch import Tensor

from emloc.formats.coded_matrix import CodedMatrix
from emloc.layers.coded_weight import CodedWeight
from emloc.linalg.row_rounding import rounded_parts

GROUP_SIZE = 64
"""Numbers that share a scale, as in NF4."""


def as_rows(tensor: Tensor) -> Tensor:
    """A weight of any shape as rows: of a stack of matrices their rows, of a convolution its outputs."""
    return tensor.flatten(0, 1) if tensor.dim() == 3 else tensor.flatten(1)


def coded(tensor: Tensor, bits: int) -> CodedWeight:
    """A weight in so many bits.

    Args:
        tensor: of two axes or more, any floating dtype, and finite.
        bits: 2, 3, 4 or 8.
    """
    rows = as_rows(tensor)
    matrix = CodedMatrix(rows.shape[0], rows.shape[1], bits, GROUP_SIZE)
    parts = [matrix.encoded(grid, codes) for grid, codes in rounded_parts(rows, bits, GROUP_SIZE)]
    stored = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return matrix.decoded(stored.__getitem__)
