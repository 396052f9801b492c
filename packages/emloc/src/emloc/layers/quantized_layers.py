"""Layers that hold their weight in few bits, as `nn.Linear` and `nn.Conv2d` that PEFT knows."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from emloc.layers.emulated_layer import EmulatedLayer
from emloc.layers.read_only_weight import ReadOnlyWeight
from emloc.layers.remade_weight import product_dtype, remade_convolution, remade_linear
from emloc.linalg.operator import Operator

Stored = Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]
"""Shapes and dtypes of a layer's stored tensors, by name; without a dtype, that of the dense layer."""

Decode = Callable[[Callable[[str], Tensor]], Operator]
"""Gives the weight, d_out × d_in, of stored tensors that it reads by name."""


class StoredWeight(EmulatedLayer, nn.Module):
    """The stored tensors of a layer, as frozen parameters, and the weight that they stand for."""

    made_in: torch.dtype
    _names: tuple[str, ...]
    _decode: Decode
    _shown: str

    def hold(self, stored: Stored, decode: Decode, shown: str, like: tuple[Any, Any]) -> None:
        """Take empty tensors in.

        Args:
            stored: the tensors to hold.
            decode: gives their weight.
            shown: sizes of the format, for `repr`.
            like: the dtype that the weight is decoded in, and the device.
        """
        (self.made_in, device), self._names = like, tuple(stored)
        self._decode, self._shown = decode, shown
        for name, (shape, kind) in stored.items():
            empty = torch.empty(shape, dtype=kind or self.made_in, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follow casts of the model: the codes have none, so the dtype is asked for."""
        super()._apply(fn, recurse)
        first = self._stored()[0]
        self.made_in = fn(torch.empty(0, dtype=self.made_in, device=first.device)).dtype
        return self

    def _stored(self) -> list[Tensor]:
        return [self.get_parameter(name) for name in self._names]

    def _operator(self, *stored: Tensor) -> Operator:
        return self._decode(dict(zip(self._names, stored)).__getitem__)

    def _read_only(self, shape: tuple[int, ...]) -> Tensor:
        operator, dtype = (
            self._operator(*(tensor.detach() for tensor in self._stored())),
            self.made_in,
        )
        return ReadOnlyWeight(lambda: operator.dense(dtype), shape, dtype, self._stored()[0].device)

    def reset_parameters(self) -> None:
        """Nothing to draw: codes always come from a checkpoint."""


class QuantizedLinear(StoredWeight, nn.Linear):
    """`y = x @ Wᵀ + bias` for a weight that is decoded while it is multiplied.

    Args:
        d_in, d_out: sizes.
        bias: whether there is one.
        stored: the tensors to hold.
        decode: gives their weight.
        shown: sizes of the format, for `repr`.
        dtype: of the bias, and that `weight` is decoded in.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        bias: bool,
        stored: Stored,
        decode: Decode,
        shown: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features, self.out_features = d_in, d_out
        self.hold(stored, decode, shown, (dtype, device))
        made = nn.Parameter(torch.empty(d_out, dtype=dtype, device=device), requires_grad=False)
        self.bias = made if bias else None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, d_out × d_in, decoded where its values are used; read-only."""
        return self._read_only((self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """(..., d_in) to (..., d_out)."""
        dtype = product_dtype(input)
        return remade_linear(
            input,
            lambda *stored: self._operator(*stored).dense(dtype),
            self.bias,
            *self._stored(),
        )

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear prints them, and the format's."""
        return f"{super().extra_repr()}, {self._shown}"


class QuantizedConv2d(StoredWeight, nn.Conv2d):
    """A convolution whose kernel, as a matrix, is decoded; see `QuantizedLinear`.

    Args:
        dense: the convolution whose place it takes; not grouped.
        stored, decode, shown: see `QuantizedLinear`.
    """

    def __new__(cls, *sizes: Any, **options: Any) -> Any:
        """A dense `nn.Conv2d` where PEFT calls the class of the layer that it adapts."""
        if sizes and not isinstance(sizes[0], nn.Module):
            return nn.Conv2d(*sizes, **options)
        return super().__new__(cls)

    def __init__(self, dense: nn.Conv2d, stored: Stored, decode: Decode, shown: str) -> None:
        nn.Module.__init__(self)  # nn.Conv2d's own would allocate the dense weight
        own = vars(self)
        self.__dict__.update({k: v for k, v in vars(dense).items() if k not in own})
        dtype, device = dense.weight.dtype, dense.weight.device
        self.hold(stored, decode, shown, (dtype, device))
        made = nn.Parameter(
            torch.empty(self.out_channels, dtype=dtype, device=device), requires_grad=False
        )
        self.bias = None if dense.bias is None else made

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The kernel, d_out × channels × height × width, decoded where its values are used; read-only."""
        return self._read_only((self.out_channels, self.in_channels, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        """(batch, in_channels, height, width) to (batch, out_channels, height', width')."""
        shape = (self.out_channels, self.in_channels, *self.kernel_size)
        dtype = product_dtype(input)
        return remade_convolution(
            self._padded(input),
            lambda *stored: self._operator(*stored).dense(dtype).view(shape),
            self.bias,
            (self.stride, 0, self.dilation),
            *self._stored(),
        )

    def _padded(self, input: Tensor) -> Tensor:
        before, mode = self._reversed_padding_repeated_twice, self.padding_mode
        if any(before):
            input = nn.functional.pad(input, before, "constant" if mode == "zeros" else mode)
        return input

    def extra_repr(self) -> str:
        """Sizes, as nn.Conv2d prints them, and the format's."""
        return f"{super().extra_repr()}, {self._shown}"
