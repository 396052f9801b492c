"""Products with a weight that is held in few bits, and dense only while it is multiplied.

The weight is decoded in the forward and once more in the backward, so that between the two nothing but its
codes is held. Decoding runs over a few rows at a time, in float32 whatever the dtype of the product: what is
between codes and weight stays in the processor's cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from emloc.linalg.bit_packing import padded, unpack, unpacked_parts
from emloc.linalg.grid import ZERO_BITS, decoded_scales, decoded_zeros

ELEMENTS = {"cpu": 1 << 18}
"""Weights that are decoded at a time, by the kind of device."""

ELEMENTS_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class Codes:
    """A weight in few bits (`emloc.linalg.grid`).

    Attributes:
        packed: rows × packed columns, uint8 (`emloc.linalg.bit_packing`).
        scale_codes: rows × groups, uint8.
        largest: the largest scale of each block of scales, float32.
        zero_codes: rows × packed groups, uint8.
        columns: inputs of a row.
        bits: of a code.
        group_size: inputs of a group.
    """

    packed: Tensor
    scale_codes: Tensor
    largest: Tensor
    zero_codes: Tensor
    columns: int
    bits: int
    group_size: int

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """The weight, rows × columns."""
        rows = self.packed.shape[0]
        weight = torch.empty(rows, self.columns, dtype=dtype, device=self.packed.device)
        scales = decoded_scales(self.scale_codes, self.largest)
        zeros = decoded_zeros(unpack(self.zero_codes, scales.shape[1], ZERO_BITS), self.bits)
        step = ELEMENTS.get(weight.device.type, ELEMENTS_ELSEWHERE) // self.columns or 1
        width = padded(self.columns)
        values = torch.empty(min(step, rows), width, dtype=torch.float32, device=weight.device)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = values[: stop - start]
            for place, codes in unpacked_parts(self.packed[start:stop], self.columns, self.bits):
                part[:, place] = codes
            self._place(part, scales[start:stop], zeros[start:stop])
            weight[start:stop] = part[:, : self.columns]
        return weight

    def _place(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        """Codes to values, in place: `(code − zero) · scale`; the last group may be shorter."""
        whole = self.columns // self.group_size
        edge = whole * self.group_size
        if whole:
            inside = codes[:, :edge].unflatten(1, (whole, self.group_size))
            inside.sub_(zeros[:, :whole, None]).mul_(scales[:, :whole, None])
        if edge < self.columns:
            codes[:, edge : self.columns].sub_(zeros[:, -1:]).mul_(scales[:, -1:])


class QuantizedProduct(torch.autograd.Function):
    """`x @ Wᵀ + bias` for a frozen weight in few bits; (..., columns) to (..., rows)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Codes) -> Tensor:
        """The product; of the inputs nothing is kept."""
        ctx.codes = codes
        return torch.nn.functional.linear(x, codes.decoded(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of `x`; weight and bias are frozen."""
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return gradient @ ctx.codes.decoded(gradient.dtype), None, None


class QuantizedConvolution(torch.autograd.Function):
    """A 2-d convolution whose frozen kernel, as a matrix, is in few bits."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, codes: Codes, shape: Sequence[int], options: Any
    ) -> Tensor:
        """The convolution; of the inputs the shape is kept.

        Args:
            shape: of the kernel.
            options: stride, padding and dilation, as `torch.nn.functional.conv2d` takes them.
        """
        ctx.codes, ctx.kernel, ctx.options, ctx.read = codes, tuple(shape), options, x.shape
        kernel = codes.decoded(x.dtype).view(ctx.kernel)
        return torch.nn.functional.conv2d(x, kernel, bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient of `x`."""
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        kernel = ctx.codes.decoded(gradient.dtype).view(ctx.kernel)
        of_x = torch.nn.grad.conv2d_input(ctx.read, kernel, gradient, *ctx.options)
        return of_x, None, None, None, None
