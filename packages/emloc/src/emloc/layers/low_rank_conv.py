"""A convolution whose weight is the product of two factors, as an `nn.Conv2d` that PEFT knows.

A k × k convolution is linear in its patches: `y = W p + b`, where p holds in_channels · kh · kw numbers.
With `W = left @ right` it is a k × k convolution to `rank` channels, which alone sees stride, padding and
dilation, and then a 1 × 1 convolution to the outputs. Both factors are kept with four axes, so that a
change of memory format reaches them as it reaches a dense weight.
"""

from typing import Any

import torch
from torch import Tensor, nn

from emloc.errors import ConfigError
from emloc.layers.emulated_layer import EmulatedLayer
from emloc.layers.read_only_weight import ReadOnlyWeight


class LowRankConv2d(EmulatedLayer, nn.Conv2d):
    """`y = conv(conv(x, right), left) + bias`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype: as of `nn.Conv2d`; groups must be 1.
        rank: `left` is out_channels × rank × 1 × 1, `right` rank × in_channels × kh × kw.

    Raises:
        ConfigError: groups is not 1.
    """

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """A dense `nn.Conv2d` where no rank is given.

        PEFT makes the two convolutions of a LoRA by calling the class of the layer that it adapts.
        """
        if options.get("rank") is None and (sizes or options):  # a copy is made without arguments
            return nn.Conv2d(*sizes, **options)
        return super().__new__(cls)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Any = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        rank: int,
    ) -> None:
        if groups != 1:
            raise ConfigError(
                f"A convolution of {groups} groups ({in_channels} to {out_channels} channels) cannot be "
                f"low-rank as a whole; leave it dense."
            )
        nn.Module.__init__(self)  # nn.Conv2d's own would allocate the dense weight
        sizes = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation,
            bias=False, padding_mode=padding_mode, device="meta",
        )  # fmt: skip
        # What nn.Conv2d makes of its arguments: pairs, and how much to pad where.
        self.__dict__.update({k: v for k, v in vars(sizes).items() if k not in vars(self)})
        self.rank = rank

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, dtype=dtype, device=device), requires_grad=False)

        self.left = empty(out_channels, rank, 1, 1)
        self.right = empty(rank, in_channels, *self.kernel_size)
        self.bias = empty(out_channels) if bias else None

    @classmethod
    def like(cls, dense: nn.Conv2d, rank: int) -> "LowRankConv2d":
        """An empty layer of the sizes, dtype and device of `dense`.

        Raises:
            ConfigError: `dense` is grouped.
        """
        return cls(
            dense.in_channels, dense.out_channels, dense.kernel_size, dense.stride, dense.padding,
            dense.dilation, dense.groups, dense.bias is not None, dense.padding_mode,
            dense.weight.device, dense.weight.dtype, rank=rank,
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The product of the factors, out_channels × in_channels × kh × kw, computed anew where it is
        used; read-only.
        """
        with torch.no_grad():
            shape = (self.out_channels, *self.right.shape[1:])
            return ReadOnlyWeight.of_product(self.left.detach(), self.right.detach(), shape)

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, height', width')."""
        projected = self._conv_forward(input, self.right, None)
        return nn.functional.conv2d(projected, self.left, self.bias)

    def reset_parameters(self) -> None:
        """Nothing to draw: the factors always come from a checkpoint."""

    def extra_repr(self) -> str:
        """Sizes, as nn.Conv2d prints them, and the rank."""
        return f"{super().extra_repr()}, rank={self.rank}"
