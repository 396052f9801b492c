"""Every operation of torch as the pretend device runs it.

It runs on the values, with the host's kernels, and what it makes is wrapped again: results are those of the
CPU, bit for bit. What CUDA would refuse is refused before, in its words: tensors of two devices, other than
scalars of the host that are only read and indices of the host; pinning what is not the host's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from emloc.testing.device_tensor import HOST, DeviceTensor
from emloc.testing.traffic import Traffic

aten: Any = torch.ops.aten

MIXED = (
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
    "(when running {})"
)
NOT_PINNABLE = "cannot pin 'torch.cuda.{}' only dense CPU tensors can be pinned"

WAITING = frozenset(
    ["nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"]
)
"""Operations that wait for the device, since what they return depends on values."""

INDEXING = frozenset(["index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"])
"""Operations whose indices may be on the host."""


def operate(traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run one operation.

    Raises:
        RuntimeError: what CUDA would refuse.
        torch.OutOfMemoryError: the device's limit is reached.
    """
    if func in SPECIAL:
        return SPECIAL[func](traffic, func, args, kwargs)
    tensors, wanted = tensors_of((args, kwargs)), kwargs.get("device")
    here = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
    on_device = here if wanted is None else is_cuda(wanted)
    if not here and not on_device and not kwargs.get("pin_memory"):
        if not _is_view(func):
            traffic.read_on_host(tensors)
        return func(*args, **kwargs)
    name: str = func.overloadpacket.__name__
    if here:
        _refuse_mixed(func, name, args, kwargs)
    traffic.waits += name in WAITING or (name in INDEXING and _masks(args[1]))
    return run(traffic, func, args, kwargs, on_device)


def run(
    traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any], on_device: bool
) -> Any:
    """Run an operation on the values; what it makes is on the device or on the host."""
    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": HOST}
    pinned = kwargs.get("pin_memory")
    if pinned:
        kwargs = {**kwargs, "pin_memory": False}
    made = func(*values_of(args), **values_of(kwargs))
    given = {id(t.values): t for t in tensors_of((args, kwargs)) if isinstance(t, DeviceTensor)}

    def wrapped(tensor: Tensor) -> Tensor:
        if id(tensor) in given:  # in place
            return _followed(given[id(tensor)], func)
        if pinned:
            traffic.pin(tensor)
        return DeviceTensor(tensor, traffic) if on_device else tensor

    return _changed(Tensor, wrapped, made)


def _is_view(func: Any) -> bool:
    """Return whether an operation makes another tensor of the same values and reads none."""
    returned = [formal.alias_info for formal in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def tensors_of(tree: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    tensors: list[Tensor] = []
    _gather(tree, tensors)
    return tensors


def _gather(tree: Any, tensors: list[Tensor]) -> None:
    """Add all tensors of nested arguments.

    Arguments of operations are tensors and lists: torch's own walk through them takes longer than operations
    on tiny tensors, and is left to what is neither.
    """
    kind = type(tree)
    if isinstance(tree, Tensor):
        tensors.append(tree)
    elif kind is tuple or kind is list:
        for part in tree:
            _gather(part, tensors)
    elif kind is dict:
        for part in tree.values():
            _gather(part, tensors)
    elif kind not in _LEAVES:
        tensors += [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _changed(of: type[Tensor], change: Callable[[Any], Any], tree: Any) -> Any:
    """Nested arguments with their tensors of one class changed."""
    kind = type(tree)
    if isinstance(tree, of):
        return change(tree)
    if kind is tuple:
        return tuple([_changed(of, change, part) for part in tree])
    if kind is list:
        return [_changed(of, change, part) for part in tree]
    if kind is dict:
        return {name: _changed(of, change, part) for name, part in tree.items()}
    if kind in _LEAVES or isinstance(tree, Tensor):
        return tree
    return tree_map_only(of, change, tree)


_LEAVES = frozenset(
    [
        int,
        float,
        bool,
        str,
        complex,
        type(None),
        torch.device,
        torch.dtype,
        torch.layout,
        torch.memory_format,
    ]
)
"""Kinds of arguments that hold nothing."""


def values_of(tree: Any) -> Any:
    """The same arguments with the values of the device's tensors.

    Raises:
        RuntimeError: a tensor's storage has been freed.
    """
    return _changed(DeviceTensor, _values, tree)


def _values(tensor: DeviceTensor) -> Tensor:
    if tensor.numel() and not tensor.values.untyped_storage().nbytes():
        raise RuntimeError("CUDA error: an illegal memory access: the tensor's storage was freed")
    return tensor.values


def is_cuda(device: Any) -> bool:
    """Return whether a device, or its name, is CUDA's."""
    return torch.device(device).type == "cuda"


def _followed(tensor: DeviceTensor, func: Any) -> DeviceTensor:
    """Refuse what a wrapper cannot follow."""
    values = tensor.values
    if tensor.shape != values.shape or tensor.stride() != values.stride():
        raise NotImplementedError(f"{func} changes a shape in place, which is not pretended")
    return tensor


def _refuse_mixed(func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    read = (args[0], args[2:]) if name in INDEXING else (args, kwargs)
    host = [tensor for tensor in tensors_of(read) if not isinstance(tensor, DeviceTensor)]
    written = {id(t) for arg, formal in zip(args, func._schema.arguments)
               if formal.alias_info is not None and formal.alias_info.is_write
               for t in tensors_of(arg)}  # fmt: skip
    if any(tensor.ndim or id(tensor) in written for tensor in host):
        raise RuntimeError(MIXED.format(func))


def _masks(indices: Any) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_of(indices))


def _to_copy(traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`.to(…)`: the one way between the devices besides `copy_`."""
    source, wanted = args[0], kwargs.get("device")
    here = isinstance(source, DeviceTensor)
    on_device = here if wanted is None else is_cuda(wanted)
    kwargs = dict(kwargs)
    eager = not kwargs.pop("non_blocking", False)
    made = run(traffic, func, args, kwargs, on_device)
    if here != on_device:
        _count_transfer(traffic, source, source if on_device else made, on_device, eager)
    elif not here:
        traffic.read_on_host([source])
    if here and not on_device and not eager:
        traffic.pin(made)  # as CUDA does
    return made


def _copy(traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`target.copy_(source)`, whichever device each is on."""
    target, source, *rest = args
    here, from_device = isinstance(target, DeviceTensor), isinstance(source, DeviceTensor)
    values_of(target).copy_(values_of(source))
    if here != from_device:
        eager = not (rest[0] if rest else kwargs.get("non_blocking", False))
        _count_transfer(traffic, source, source if here else target, here, eager)
    elif not here:
        traffic.read_on_host([source])
    return target


def _count_transfer(
    traffic: Traffic, source: Tensor, host: Tensor, on_device: bool, eager: bool
) -> None:
    """Count a copy of `source`; `host` is the side that is not the device's."""
    (traffic.to_device if on_device else traffic.to_host).add(
        source.numel() * source.element_size()
    )
    if not eager:
        traffic.unpinned += on_device and not traffic.is_pinned(host)
        if not on_device:
            traffic.arrives(host)


def _read(traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    traffic.reads += isinstance(args[0], DeviceTensor)
    return func(*values_of(args), **kwargs)


def _pin(traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if isinstance(args[0], DeviceTensor):
        raise RuntimeError(NOT_PINNABLE.format(args[0].type().rpartition(".")[2]))
    copied = args[0].clone()
    traffic.pin(copied)
    return copied


def _is_pinned(traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return not isinstance(args[0], DeviceTensor) and traffic.is_pinned(args[0])


def _widened(traffic: Traffic, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A product with a wider result, which only CUDA has: of widened factors."""
    *factors, dtype = args
    plain: dict[str, Any] = {"dtype": "default", "dtype_out": "out"}
    wide = [factor.to(dtype) for factor in values_of(factors)]
    product = getattr(func.overloadpacket, plain[func._overloadname])
    _refuse_mixed(func, func.overloadpacket.__name__, factors, {})
    return run(traffic, product, wide, kwargs, isinstance(factors[0], DeviceTensor))


SPECIAL: dict[Any, Callable[[Traffic, Any, Sequence[Any], dict[str, Any]], Any]] = {
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
    aten._local_scalar_dense.default: _read,
    aten._pin_memory.default: _pin,
    aten.pin_memory.default: _pin,
    aten.is_pinned.default: _is_pinned,
    **{
        getattr(product, overload): _widened
        for product in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)
        for overload in ("dtype", "dtype_out")
    },
}

DeviceTensor.operate = operate
