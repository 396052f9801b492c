"""Layers whose weight is made of stored tensors each time that it is needed.

Composed of single operations, autograd would keep the weight that was made from the forward to the backward,
and so at one time the dense weights of all layers. Here the backward makes it once more.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

Make = Callable[..., Tensor]
"""Makes a weight, d_out × d_in or a kernel, of stored tensors."""


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `x` is multiplied in: its own, or what autocast has in its place."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def remade_linear(x: Tensor, make: Make, bias: Tensor | None, *stored: Tensor) -> Tensor:
    """`x @ make(*stored)ᵀ + bias`, (..., d_in) to (..., d_out); bias and stored tensors are frozen."""
    return cast(Tensor, _RemadeLinear.apply(x, make, bias, *stored))


class _RemadeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Make, bias: Tensor | None, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.make, ctx.dtype = make, x.dtype
        return torch.nn.functional.linear(x, make(*stored), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        stored, of_x = ctx.saved_tensors, None
        if ctx.needs_input_grad[0]:
            # Under autocast the output is of another dtype than the weight.
            weight = ctx.make(*stored).to(gradients[0].dtype)
            of_x = (gradients[0] @ weight).to(ctx.dtype)
        return of_x, None, None, *(None for _ in stored)


def remade_convolution(
    x: Tensor, make: Make, bias: Tensor | None, options: Any, *stored: Tensor
) -> Tensor:
    """A 2-d convolution of `x` with the kernel `make(*stored)`; bias and stored tensors are frozen.

    Args:
        options: stride, padding and dilation, as `torch.nn.functional.conv2d` takes them.
    """
    return cast(Tensor, _RemadeConvolution.apply(x, make, bias, options, *stored))


class _RemadeConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, make: Make, bias: Tensor | None, options: Any, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.make, ctx.options, ctx.dtype, ctx.shape = make, options, x.dtype, x.shape
        return torch.nn.functional.conv2d(x, make(*stored), bias, *options)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        stored, of_x = ctx.saved_tensors, None
        if ctx.needs_input_grad[0]:
            kernel = ctx.make(*stored).to(gradients[0].dtype)
            of_x = conv2d_input(ctx.shape, kernel, gradients[0], *ctx.options)
            of_x = of_x.to(ctx.dtype)
        return of_x, None, None, None, *(None for _ in stored)
