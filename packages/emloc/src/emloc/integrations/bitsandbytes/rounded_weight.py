"""A weight as bitsandbytes' layers multiply with it: quantised, and back.

Bit for bit what `Linear4bit` and `Linear8bitLt` hold: 4 bits in blocks of 64 along the rows, whose scales may
be quantised once more (Dettmers et al. 2023, arXiv 2305.14314); or 8 bits with a scale per row
(Dettmers et al. 2022, arXiv 2208.07339), quantised from float16. On the CPU, a part at a time, so that
bitsandbytes' own workspace, some twenty bytes per weight, is that of a part.
"""

from typing import Any, cast

import torch
from torch import Tensor

from emloc.adapters.rounding import Rounding
from emloc.errors import DependencyError
from emloc.linalg.merging import ROWS

BLOCK = 64
"""Weights per scale, bitsandbytes' default."""

SCALES = 256
"""Scales per scale of scales."""

PART = 1 << 18
"""Weights that are quantised at a time: whole blocks."""


def rounded(weight: Tensor, rounding: Rounding) -> Tensor:
    """The weight that a layer of few bits stands for.

    Args:
        weight: d_out × d_in, on the CPU, in the dtype that it was loaded in.

    Returns:
        d_out × d_in: of 4 bits in the weight's dtype (float32 for float64), as bitsandbytes decodes them; of
        8 bits in float32.

    Raises:
        DependencyError: bitsandbytes is not installed.
    """
    functions = functional()
    if rounding.bits == 8:
        return _in_8_bits(functions, weight)
    own = weight if weight.dtype in (torch.float16, torch.bfloat16) else weight.float()
    return _in_4_bits(functions, own.contiguous(), rounding)


def _in_8_bits(functions: Any, weight: Tensor) -> Tensor:
    made = torch.empty(weight.shape, dtype=torch.float32)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        codes, scales, _ = functions.int8_vectorwise_quant(weight[rows].to(torch.float16))
        made[rows] = functions.int8_vectorwise_dequant(codes, scales)
    return made


def _in_4_bits(functions: Any, weight: Tensor, rounding: Rounding) -> Tensor:
    kind = rounding.quant_type
    parts = weight.view(-1).split(PART)
    held: list[Tensor] = []
    scales: list[Tensor] = []
    for part in parts:
        codes, state = functions.quantize_4bit(
            part, blocksize=BLOCK, compress_statistics=False, quant_type=kind
        )
        held.append(codes)
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    if rounding.double_quant:
        mean = absmax.mean()
        codes, state = functions.quantize_blockwise(absmax - mean, blocksize=SCALES)
        absmax = functions.dequantize_blockwise(codes, state) + mean
    table = functions.get_4bit_type(kind, device="cpu")
    made = torch.empty_like(weight)
    for target, codes, own in zip(made.view(-1).split(PART), held, absmax.split(PART // BLOCK)):
        state = functions.QuantState(
            absmax=own.contiguous(),
            shape=target.shape,
            code=table,
            blocksize=BLOCK,
            quant_type=kind,
            dtype=weight.dtype,
        )
        target.copy_(functions.dequantize_4bit(codes, state).view(-1))
    return made


def functional() -> Any:
    """bitsandbytes' functions.

    Raises:
        DependencyError: it is not installed.
    """
    try:
        import bitsandbytes.functional as functions
    except ImportError as problem:
        raise DependencyError(
            "Reproducing a base in few bits needs bitsandbytes, which is not installed; pip install "
            "'emloc[bitsandbytes]'."
        ) from problem
    return cast(Any, functions)
