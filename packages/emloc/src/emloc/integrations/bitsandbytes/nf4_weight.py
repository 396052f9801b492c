"""A weight in bitsandbytes' NF4: codes of 4 bits in blocks of 64, whose scales are quantised once more.

bitsandbytes' own kernels decode it, on the CPU and on CUDA (Dettmers et al. 2023, arXiv 2305.14314).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from emloc.errors import DependencyError

BLOCK = 64
"""Weights per scale."""

SCALES = 256
"""Scales per scale of scales."""


@dataclass(frozen=True)
class NF4Weight:
    """`Operator`, d_out × d_in.

    Attributes:
        codes: two weights per byte, in rows: ⌈d_out · d_in / 2⌉, uint8.
        absmax: a code of 8 bits for the largest weight of each block, uint8.
        nested: the largest of each 256 of these, and their mean in the end: float32 in the bits of an int32,
            which no cast of a model to another dtype reaches.
        shape: d_out × d_in.
    """

    codes: Tensor
    absmax: Tensor
    nested: Tensor
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight."""
        functional = bitsandbytes()
        device = self.codes.device
        # bitsandbytes decodes into the three dtypes that layers compute in.
        made = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32
        numbers = self.nested.view(torch.float32)
        scales = functional.QuantState(
            absmax=numbers[:-1].contiguous(),
            code=_scale_map(device),
            blocksize=SCALES,
            dtype=torch.float32,
        )
        # As one row: of several, some processors decode the blocks wrongly.
        numel = self.shape[0] * self.shape[1]
        state = functional.QuantState(
            absmax=self.absmax,
            shape=torch.Size([numel]),
            code=functional.get_4bit_type("nf4", device=device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=made,
            offset=numbers[-1],
            state2=scales,
        )
        weight: Tensor = functional.dequantize_4bit(self.codes[:, None], state)
        return weight.view(self.shape).to(dtype)

    def __matmul__(self, columns: Tensor) -> Tensor:
        """The product with columns, d_in × n, in their dtype."""
        return self.dense(columns.dtype) @ columns


def quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`codes`, `absmax` and `nested` of a weight, d_out × d_in."""
    packed, state = bitsandbytes().quantize_4bit(
        weight.float().contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    numbers = torch.cat([state.state2.absmax.float(), state.offset.float().reshape(1)])
    return packed.flatten(), state.absmax, numbers.view(torch.int32)


def _scale_map(device: torch.device) -> Tensor:
    """The values of the 8-bit codes of scales."""
    return bitsandbytes().create_dynamic_map().to(device)


def bitsandbytes() -> Any:
    """The library's functions.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import bitsandbytes.functional as functional
    except ImportError as problem:
        raise DependencyError(
            "format=nf4 needs bitsandbytes; pip install 'emloc[bitsandbytes]', or pass format=quantized "
            "with bits=4, which is nearer to the base."
        ) from problem
    return cast(Any, functional)
