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
from emloc.machine.memory_limit import is_out_of_memory
from emloc.machine.progress import warn

if TYPE_CHECKING:
    from emloc.layers.coded_weight import CodedWeight


def decode_at_once(coded: "CodedWeight", into: Tensor) -> bool:
    """Write a weight, d_out × d_in in any floating dtype; returns whether that could be done here."""
    if torch.version.cuda is None or not coded.packed.is_cuda or not into.numel():
        return False
    with torch.cuda.device(coded.packed.device):  # Triton computes on the thread's
        kernel = _kernel()
        if kernel is not None:
            launch(kernel, coded, into)
    return kernel is not None


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


@cache
def _kernel() -> Any:
    """The kernel; None where Triton is not installed, or cannot run, as where there is no compiler for it.

    Raises:
        RuntimeError: the GPU has not the memory to find out, or met an error before.
    """
    try:
        from emloc.layers.triton_decoding import decode
    except ImportError:
        return None
    torch.cuda.synchronize()  # an error that was there before is not Triton's
    try:
        _try(decode)
    except Exception as problem:  # of Triton, of the compiler that it calls, of what that writes
        if is_out_of_memory(problem):
            raise
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        warn(f"Triton cannot run here, so weights are decoded more slowly: {first}")
        return None
    return decode


def _try(kernel: Any) -> None:
    """Decode a weight of eight numbers."""
    from emloc.layers.coded_weight import CodedWeight  # which imports this module

    def codes(count: int) -> Tensor:
        return torch.zeros(1, count, dtype=torch.uint8, device="cuda")

    largest = torch.zeros(1, dtype=torch.int32, device="cuda")
    weight = CodedWeight(codes(4), codes(1), largest, codes(4), 8, 4, 32)
    launch(kernel, weight, torch.empty(1, 8, device="cuda"))
    torch.cuda.synchronize()
