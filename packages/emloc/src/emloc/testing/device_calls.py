"""The few calls of torch that are answered before any operation runs, as the pretend device answers them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emloc.testing.device_operations import aten, is_cuda, tensors_of, values_of
from emloc.testing.device_storage import DEVICE
from emloc.testing.device_tensor import DeviceTensor

GENERATOR = "Expected a '{}' device type for generator but found '{}'"
FUSED = 1
"""The host's fused attention, among the choices of `torch._fused_sdp_choice`."""


class Calls(TorchFunctionMode):
    """Name the device by its number, and replace the calls of `_CALLS`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer one call."""
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _numbered(kwargs["device"])
        if kwargs.get("generator") is not None:
            _refuse_generator(args, kwargs)
        if func in _MAKING and kwargs.get("device") == DEVICE:
            return func(*args, **{**kwargs, "device": None}).to(DEVICE)
        replaced = _CALLS.get(func)
        return func(*args, **kwargs) if replaced is None else replaced(*args, **kwargs)


def _numbered(device: Any) -> Any:
    """`cuda` with the number of the one device; anything else as it is.

    Raises:
        RuntimeError: another number.
    """
    if not isinstance(device, (str, torch.device)) or not is_cuda(device):
        return device
    if torch.device(device).index not in (None, DEVICE.index):
        raise RuntimeError("CUDA error: invalid device ordinal")
    return DEVICE


def _refuse_generator(args: Any, kwargs: dict[str, Any]) -> None:
    given = [tensor.device for tensor in tensors_of(args)]
    wanted = torch.device(kwargs.get("device") or next(iter(given), "cpu")).type
    actual = kwargs["generator"].device.type
    if wanted != actual:
        raise RuntimeError(GENERATOR.format(wanted, actual))


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return Tensor.to(tensor, *map(_numbered, args), **kwargs)


def _cuda(tensor: Tensor, device: Any = None, non_blocking: bool = False, **kwargs: Any) -> Tensor:
    return Tensor.to(tensor, device=DEVICE, non_blocking=non_blocking, **kwargs)


def _index(index: Any) -> Any:
    """Lists as tensors of the host, since C++ would fill a tensor of the device with them."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _getitem(tensor: Tensor, index: Any) -> Tensor:
    return Tensor.__getitem__(tensor, _index(index))


def _setitem(tensor: Tensor, index: Any, value: Any) -> None:
    Tensor.__setitem__(tensor, _index(index), value)


def _set_data(tensor: Tensor, value: Tensor) -> None:
    """`tensor.data = value`, which may take a tensor to the other device."""
    here, there = isinstance(tensor, DeviceTensor), isinstance(value, DeviceTensor)
    if not here and not there:
        Tensor.data.__set__(tensor, value)  # pyright: ignore
    elif here and there and tensor.shape == value.shape and tensor.stride() == value.stride():
        tensor.values = value.values
    else:
        fresh, gradient = value.detach(), tensor.grad
        if isinstance(tensor, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
        torch.utils.swap_tensors(tensor, fresh.requires_grad_(tensor.requires_grad))
        tensor.grad = None if gradient is None else gradient.to(value.device)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernel that the host would choose, so that both give the same numbers."""
    named = {"scale": scale, "enable_gqa": enable_gqa}
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    learnt = attn_mask is not None and attn_mask.requires_grad  # no fused kernel has its gradient
    if isinstance(query, DeviceTensor) and not learnt:
        given = (query, key, value, attn_mask, dropout_p, is_causal)
        if torch._fused_sdp_choice(*values_of(given), **named) == FUSED:  # pyright: ignore
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                nought = torch.zeros((), dtype=query.dtype)
                attn_mask = torch.where(attn_mask, nought, nought - torch.inf)
            fused = aten._scaled_dot_product_flash_attention_for_cpu
            return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[
                0
            ]
    plain = torch._C._nn.scaled_dot_product_attention  # pyright: ignore
    return plain(query, key, value, attn_mask, dropout_p, is_causal, **named)


_MAKING = {torch.tensor, torch.as_tensor, torch.asarray}
_CALLS: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cuda: _cuda,
    Tensor.__getitem__: _getitem,
    Tensor.__setitem__: _setitem,
    Tensor.data.__set__: _set_data,  # pyright: ignore
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
