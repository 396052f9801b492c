"""Tensors that say that they are on `cuda:0` and whose values are on the host.

A `DeviceTensor` is a wrapper without memory of its own; `values` is a host tensor of the same shape.
Autograd, autocast and the choices that torch makes by device see a CUDA tensor; below them every operation
runs on the values (`emloc.testing.device_operations`).
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from emloc.testing.device_storage import DEVICE, DeviceStorage
from emloc.testing.traffic import Traffic

HOST = torch.device("cpu")
NO_NUMPY = (
    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
    "memory first."
)


class DeviceTensor(Tensor):
    """A tensor on the pretend device.

    Attributes:
        values: the host tensor behind it.
        traffic: the counts of its device.
        operate: runs an operation; given by `device_operations`, which knows this class.
    """

    operate: ClassVar[Callable[..., Any]]
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

    def set_(self, *source: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All bytes of a storage of the device, for a tensor of numbers of 8 bits."""
        if len(source) == 1 and isinstance(source[0], DeviceStorage) and self.dtype == torch.uint8:
            return source[0].as_tensor()
        return Tensor.set_(self, *source)

    def numpy(self, *, force: bool = False) -> Any:
        """Refused as CUDA does.

        Raises:
            TypeError: without `force`.
        """
        if not force:
            raise TypeError(NO_NUMPY)
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __dlpack__(self, **named: Any) -> Any:
        raise BufferError("the memory of a pretend device cannot be shared; use Tensor.cpu() first")

    def tolist(self) -> Any:
        """Copy to the host and read there."""
        return self.cpu().tolist()

    def new_tensor(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, data: Any, *, dtype: Any = None, device: Any = None, **named: Any
    ) -> Any:
        """A tensor of the same dtype and device."""
        made = torch.tensor(data, dtype=dtype or self.dtype, **named)
        return made.to(DEVICE if device is None else device)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a tensor of the host, whose pickle needs no device to be read."""
        return self.detach().cpu().__reduce_ex__(protocol)

    def data_ptr(self) -> int:
        """The address of the values."""
        return self.values.data_ptr()

    def untyped_storage(self) -> Any:
        """The device's storage."""
        return DeviceStorage(self.values.untyped_storage(), self.traffic)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone()
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
            copied.grad = deepcopy(self.grad, memo)
        return memo[id(self)]

    def __format__(self, spec: str) -> str:
        """Format as a tensor does: a scalar is read."""
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
        kwargs = kwargs or {}
        first = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, DeviceTensor))
        return cls.operate(first.traffic, func, args, kwargs)
