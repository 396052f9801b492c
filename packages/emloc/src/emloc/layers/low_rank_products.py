"""The products of low-rank layers with a LoRA beside them, with nothing between the products.

Composed of single operations, a LoRA costs more than its multiplications: its output is made, scaled and
added, three passes over tensors as large as the layer's output, and back through the inputs every
member of a group adds its gradient in a pass of its own. Here BLAS adds while it multiplies.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Project(torch.autograd.Function):
    """`x @ rightᵀ` and, for each `down` of a LoRA that reads the same input, `x @ downᵀ`.

    `x` is (..., d_in), `right` rank × d_in and frozen, `downs` r × d_in; results are (..., rank) and
    (..., r).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, right: Tensor, *downs: Tensor) -> tuple[Tensor, ...]:
        """All results; only `x` is kept."""
        ctx.save_for_backward(x, right, *downs)
        linear = torch.nn.functional.linear
        lora = linear(x, _joined(downs, 0))
        return linear(x, right), *lora.split([down.shape[0] for down in downs], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of the inputs that need them."""
        x, right, *downs = ctx.saved_tensors
        projected, lora = _rows(gradients[0]), _rows(_joined(gradients[1:], -1))
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (projected @ right).addmm_(lora, _joined(downs, 0)).view(x.shape)
        of_downs = (lora.T @ _rows(x)).split([down.shape[0] for down in downs])
        return of_x, None, *of_downs


class Expand(torch.autograd.Function):
    """`h @ leftᵀ + bias + scaling · (z @ upᵀ)`.

    `h` is (..., rank), `z` (..., r), `left` d_out × rank and `bias` frozen, `up` d_out × r; the result
    is (..., d_out).
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        z: Tensor,
        left: Tensor,
        bias: Tensor | None,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        """Only `z` is kept."""
        ctx.save_for_backward(z, left, up)
        ctx.scaling = scaling
        y = torch.nn.functional.linear(_rows(h), left, bias)
        y.addmm_(_rows(z), up.T, alpha=scaling)
        return y.view(*h.shape[:-1], left.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of the inputs that need them."""
        z, left, up = ctx.saved_tensors
        shape, of_y = gradient.shape[:-1], _rows(gradient)
        of_z = _product(of_y, up, ctx.scaling).view(*shape, up.shape[1])
        of_up = _product(of_y.T, _rows(z), ctx.scaling)
        return (of_y @ left).view(*shape, left.shape[1]), of_z, None, None, of_up, None


def _product(a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scaling)  # what it would add is not read


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
