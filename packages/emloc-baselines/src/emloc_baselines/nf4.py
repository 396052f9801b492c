"""Weights in four bits as bitsandbytes stores them: NormalFloat codes, scales quantised once more.

Per 64 weights one scale (absmax), per 256 scales one float and an 8-bit code each (double quantisation):
4 + 8/64 + 32/(64·256) ≈ 4.13 bits per weight. (Dettmers et al. 2023, arXiv 2305.14314.)
"""

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from emloc.errors import DependencyError
from emloc_baselines.light import Piece

BLOCK = 64
"""Weights per scale, QLoRA's and bitsandbytes' own."""


def quantise(weight: Tensor) -> dict[str, Tensor]:
    """The tensors of a quantised weight, by what bitsandbytes' checkpoints append to its name.

    Args:
        weight: d_out × d_in.
    """
    functional = _functional()
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
    )
    parts: dict[str, Tensor] = state.as_dict(packed=True)
    return {"": packed, **{f".{name}": tensor for name, tensor in parts.items()}}


@cache
def rows_are_decoded() -> bool:
    """Return whether bitsandbytes rightly decodes, on this processor, rows that are not whole blocks.

    Its kernel for AVX512 (0.50) begins every row with a new block; quantising does not.
    """
    functional = _functional()
    weight = torch.linspace(-1, 1, 4 * (BLOCK + 2)).view(4, -1)
    codes, state = functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    whole = functional.dequantize_4bit(codes, state)
    state.shape = torch.Size([weight.numel()])
    return torch.equal(whole.view(-1), functional.dequantize_4bit(codes, state).view(-1))


def quantised_pieces(name: str, read: Callable[[], Tensor]) -> list[Piece]:
    """The pieces that take the place of a weight.

    Args:
        name: of the weight's tensor.
        read: the weight, d_out × d_in.
    """
    # A shard's header needs all sizes, and that of the state, which is JSON, depends on the values: so
    # every weight is quantised twice rather than all of a shard's held.
    made: dict[str, Tensor] = {}

    def part(key: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            if not made:
                made.update(quantise(read()))
            return made.pop(key)

        return make

    sizes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in quantise(read()).items()}
    return [Piece(f"{name}{key}", kind, size, part(key)) for key, (kind, size) in sizes.items()]


def _functional() -> Any:
    try:
        import bitsandbytes.functional as functional
    except ImportError as problem:
        raise DependencyError(
            "qlora needs bitsandbytes; pip install 'emloc-baselines[qlora]'."
        ) from problem
    return cast(Any, functional)
