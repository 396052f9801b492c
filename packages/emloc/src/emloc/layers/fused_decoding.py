"""Decoding of coded weights on a GPU in one pass over the weight, where Triton is at hand.

Composed of torch's operations, decoding writes and reads a weight some ten times in float32. Where Triton is
missing, or cannot compile here, those operations do it, with the same values.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emloc.linalg.bit_packing import PLANES, padded
from emloc.linalg.gpu_kernels import why_not
from emloc.linalg.grid import SCALES, ZERO_BITS
from emloc.linalg.trellis import WINDOW, levels, sequences_of
from emloc.machine.progress import warn

if TYPE_CHECKING:
    from emloc.layers.coded_weight import CodedWeight
    from emloc.layers.trellis_weight import TrellisWeight


def decode_at_once(coded: "CodedWeight", into: Tensor) -> bool:
    """Write a weight on a grid, d_out × d_in of any floating dtype; returns whether that is done here."""
    return _decoded(coded.packed, into, lambda kernels: launch(kernels.decode, coded, into))


def decode_trellis_at_once(coded: "TrellisWeight", into: Tensor) -> bool:
    """Write a weight along a trellis, as `decode_at_once` does."""
    return _decoded(
        coded.packed, into, lambda kernels: launch_trellis(kernels.decode_trellis, coded, into)
    )


def _decoded(packed: Tensor, into: Tensor, write: Callable[[Any], None]) -> bool:
    if torch.version.cuda is None or not packed.is_cuda or not into.numel():
        return False
    with torch.cuda.device(packed.device):  # Triton computes on the thread's
        kernels = _kernels()
        if kernels is not None:
            write(kernels)
    return kernels is not None


BLOCK = 1024
"""Columns that one program decodes."""


def launch(kernel: Any, coded: "CodedWeight", into: Tensor) -> None:
    """Run `decode` of `triton_decoding`."""
    rows, groups = coded.scale_codes.shape
    kernel[(rows, -(-coded.columns // BLOCK))](
        coded.packed,
        coded.scale_codes,
        coded.largest.view(torch.float32) / 255,
        coded.zero_codes,
        into,
        ((1 << coded.bits) - 1) / ((1 << ZERO_BITS) - 1),
        ZERO_BYTES=coded.zero_codes.shape[1],
        ZERO_STEP=padded(groups) * ZERO_BITS // 8,
        **_places(coded),
    )


def launch_trellis(kernel: Any, coded: "TrellisWeight", into: Tensor) -> None:
    """Run `decode_trellis` of `triton_decoding`."""
    rows = coded.scale_codes.shape[0]
    kernel[(rows, -(-coded.columns // BLOCK))](
        coded.packed,
        coded.scale_codes,
        coded.largest.view(torch.float32) / 255,
        levels(coded.bits, coded.packed.device),
        into,
        BITS=coded.bits,
        CODES=-(-WINDOW // coded.bits),
        STEPS=sequences_of(rows)[1],
        **_places(coded),
    )


def _places(coded: "CodedWeight | TrellisWeight") -> dict[str, Any]:
    """The constants that say where codes and scales lie."""
    low, *high = PLANES[coded.bits]
    size = padded(coded.columns)
    return {
        "COLUMNS": coded.columns,
        "GROUPS": coded.scale_codes.shape[1],
        "GROUP": coded.group_size,
        "BYTES": coded.packed.shape[1],
        "LOW": low,
        "LOW_STEP": size * low // 8,
        "HIGH": bool(high),
        "HIGH_STEP": size // 8,
        "SCALES": SCALES,
        "BLOCK": BLOCK,
        "enable_fp_fusion": False,
    }


@cache
def _kernels() -> Any:
    """The module of the kernels; None where Triton is not installed, or cannot run, as without a compiler.

    Raises:
        RuntimeError: the GPU has not the memory to find out, or met an error before.
    """
    try:
        from emloc.layers import triton_decoding
    except ImportError:
        return None
    problem = why_not(lambda: _try(triton_decoding))
    if problem is not None:
        warn(f"Triton cannot run here, so weights are decoded more slowly: {problem}")
        return None
    return triton_decoding


def _try(kernels: Any) -> None:
    """Decode weights of eight numbers with each kernel."""
    from emloc.layers.coded_weight import CodedWeight  # which imports this module
    from emloc.layers.trellis_weight import TrellisWeight

    def codes(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.uint8, device="cuda")

    largest = torch.zeros(1, dtype=torch.int32, device="cuda")
    on_grid = CodedWeight(codes(1, 4), codes(1, 1), largest, codes(1, 4), 8, 4, 32)
    launch(kernels.decode, on_grid, torch.empty(1, 8, device="cuda"))
    along = TrellisWeight(codes(1, 4), codes(1, 1), largest, 8, 4, 32)
    launch_trellis(kernels.decode_trellis, along, torch.empty(1, 8, device="cuda"))
