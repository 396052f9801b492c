"""Tensors that say that they are on `cuda:0` and whose values are on the host.

A `DeviceTensor` is a wrapper without memory of its own; `values` is a host tensor of the same shape.
Autograd, autocast and the choices that torch makes by device see a CUDA tensor; below them every operation
runs on the values (`emloc.testing.device_operations`).
"""

from typing import Any

import torch
from torch import Tensor

from emloc.testing.traffic import Traffic

DEVICE = torch.device("cuda:0")
HOST = torch.device("cpu")


class DeviceTensor(Tensor):
    """A tensor on the pretend device.

    Attributes:
        values: the host tensor behind it.
        traffic: the counts of its device.
    """

    values: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]
    traffic: Traffic

    @staticmethod
    def __new__(cls: type[Any], values: Tensor, traffic: Traffic) -> "DeviceTensor":
        """Wrap `values` and count its storage as the device's.

        Raises:
            torch.OutOfMemoryError: the device's limit is reached.
        """
        traffic.hold(values)
        with torch.inference_mode(False):  # a wrapper may be a view of one that was made outside
            made: Any = Tensor._make_wrapper_subclass(  # pyright: ignore
                cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
                dtype=values.dtype, layout=values.layout, device=DEVICE,
            )  # fmt: skip
        made.values, made.traffic = values, traffic
        return made

    def __init__(self, values: Tensor, traffic: Traffic) -> None:
        pass

    def __format__(self, spec: str) -> str:
        """As a tensor's: a scalar is read."""
        return self.item().__format__(spec) if self.ndim == 0 else super().__format__(spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        """The values, and the device."""
        return f"DeviceTensor({self.values!r}, device='{DEVICE}')"

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation where no mode is active, as in another thread."""
        from emloc.testing.device_operations import operate, tensors_of

        kwargs = kwargs or {}
        first = next(t for t in tensors_of((args, kwargs)) if isinstance(t, DeviceTensor))
        return operate(first.traffic, func, args, kwargs)
