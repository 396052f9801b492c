"""Decoding of coded weights on a GPU in one pass over the weight, where Triton is at hand.

Composed of torch's operations, decoding writes and reads a weight some ten times in float32. Where Triton is
missing, or cannot compile here, those operations do it, with the same values.
"""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emloc.linalg.bit_packing import PLANES, padded
from emloc.linalg.grid import SCALES, ZERO_BITS
from emloc.machine.progress import warn

if TYPE_CHECKING:
    from emloc.layers.coded_weight import CodedWeight


def decode_at_once(coded: "CodedWeight", into: Tensor) -> bool:
    """Write a weight, d_out × d_in in any floating dtype; returns whether that could be done here."""
    kernel = _kernel() if torch.version.cuda and coded.packed.is_cuda else None
    if kernel is None or not into.numel():
        return False
    try:
        launch(kernel, coded, into)
    except (RuntimeError, OSError) as problem:  # such as no compiler for what starts the kernel
        if isinstance(problem, torch.cuda.OutOfMemoryError):
            raise
        _refused.append(str(problem))
        _kernel.cache_clear()
        warn(f"Triton cannot run here, so weights are decoded more slowly: {_first_line(problem)}")
        return False
    return True


def launch(kernel: Any, coded: "CodedWeight", into: Tensor) -> None:
    """Run the kernel of `triton_decoding`."""
    rows, groups = coded.scale_codes.shape
    low, *high = PLANES[coded.bits]
    size = padded(coded.columns)
    block = 1024
    kernel[(rows, -(-coded.columns // block))](
        coded.packed,
        coded.scale_codes,
        coded.largest.view(torch.float32) / 255,
        coded.zero_codes,
        into,
        ((1 << coded.bits) - 1) / ((1 << ZERO_BITS) - 1),
        COLUMNS=coded.columns,
        GROUPS=groups,
        GROUP=coded.group_size,
        BYTES=coded.packed.shape[1],
        ZERO_BYTES=coded.zero_codes.shape[1],
        LOW=low,
        LOW_STEP=size * low // 8,
        HIGH=bool(high),
        HIGH_STEP=size // 8,
        ZERO_STEP=padded(groups) * ZERO_BITS // 8,
        SCALES=SCALES,
        BLOCK=block,
        enable_fp_fusion=False,
    )


_refused: list[str] = []


@cache
def _kernel() -> Any:
    """The kernel, or None where Triton is not installed or has failed."""
    if _refused:
        return None
    try:
        from emloc.layers.triton_decoding import decode
    except ImportError:
        return None
    return decode


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
