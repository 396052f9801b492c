"""Layers whose weight is a product of two factors in few bits; each factor is decoded while it multiplies."""

from typing import cast

from torch import Tensor

from emloc.layers.quantized_layers import QuantizedConv2d, QuantizedLinear
from emloc.layers.remade_weight import product_dtype, remade_convolution, remade_linear
from emloc.linalg.operator import Chain


class CodedLowRankLinear(QuantizedLinear):
    """`y = (x @ rightᵀ) @ leftᵀ + bias`; see `QuantizedLinear`, whose `decode` gives a `Chain`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        stored, dtype = self._stored(), product_dtype(input)

        def right(*tensors: Tensor) -> Tensor:
            return cast(Chain, self._operator(*tensors)).right.dense(dtype)

        def left(*tensors: Tensor) -> Tensor:
            return cast(Chain, self._operator(*tensors)).left.dense(dtype)

        projected = remade_linear(input, right, None, *stored)
        return remade_linear(projected, left, self.bias, *stored)


class CodedLowRankConv2d(QuantizedConv2d):
    """`y = conv(conv(x, right), left) + bias`; see `QuantizedConv2d`, whose `decode` gives a `Chain`."""

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, height', width')."""
        stored, dtype = self._stored(), product_dtype(input)

        def right(*tensors: Tensor) -> Tensor:
            kernel = cast(Chain, self._operator(*tensors)).right.dense(dtype)
            return kernel.view(-1, self.in_channels, *self.kernel_size)

        def left(*tensors: Tensor) -> Tensor:
            return cast(Chain, self._operator(*tensors)).left.dense(dtype)[..., None, None]

        options = (self.stride, 0, self.dilation)
        projected = remade_convolution(self._padded(input), right, None, options, *stored)
        return remade_convolution(projected, left, self.bias, (1, 0, 1), *stored)
