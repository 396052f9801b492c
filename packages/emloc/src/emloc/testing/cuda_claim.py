"""Have torch's C++ believe that there is CUDA, in a build without it.

Autograd asks two objects before it touches a tensor of `cuda:0`: the guard of CUDA devices (which is
current, which stream) and the hooks of CUDA (is it there). A build without CUDA has no guard and hooks that
say no. Here it gets the guard that does nothing, which torch has for fake tensors, for good, and hooks that
say yes, while inside. Both are found by asking torch, not by their place in some version's headers.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from emloc.testing.device_tensor import DeviceTensor
from emloc.testing.traffic import Traffic

_CUDA = 1
"""`c10::DeviceType::CUDA`."""

_SLOTS = 128
"""Entries of a table of virtual functions; more than any has here."""

_Answer = ctypes.CFUNCTYPE(ctypes.c_int)
_YES, _NO = _Answer(lambda: 1), _Answer(lambda: 0)


@contextmanager
def claim_cuda() -> Iterator[None]:
    """Let torch's C++ say that it has CUDA while inside."""
    _give_guard()
    hooks, table = _hooks_that_say_yes()
    before = hooks.value
    hooks.value = ctypes.addressof(table)
    try:
        yield
    finally:
        hooks.value = before


@cache
def _give_guard() -> Any:
    """Register a guard that counts no devices, in whose place torch puts its idle one."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    register = (
        library._ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE
    )
    register.argtypes, register.restype = [ctypes.c_int8, ctypes.c_void_p], None
    table = (ctypes.c_void_p * _SLOTS)(*[_address(_NO)] * _SLOTS)
    counts_none = (ctypes.c_void_p * 1)(ctypes.addressof(table))
    register(_CUDA, ctypes.addressof(counts_none))
    torch._C._ensureCUDADeviceGuardSet()  # pyright: ignore[reportPrivateUsage]
    return table, counts_none  # kept, since others may hold it


@cache
def _hooks_that_say_yes() -> tuple[ctypes.c_void_p, Any]:
    """The address of the hooks' table, and a copy of it that says yes to CUDA, and no to its contexts."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(get_hooks())
    assert hooks.value is not None
    words = ctypes.string_at(hooks.value, _SLOTS * ctypes.sizeof(ctypes.c_void_p))
    table = (ctypes.c_void_p * _SLOTS).from_buffer_copy(words)
    [there] = _asked(hooks, torch._C._accelerator_getAccelerator)  # pyright: ignore
    asked = _asked(hooks, _backward, there)
    for slot in asked:
        table[slot] = _address(_NO)
    table[there] = _address(_YES)
    return hooks, table


def _asked(hooks: ctypes.c_void_p, ask: Callable[[], Any], yes: int | None = None) -> set[int]:
    """The functions of the hooks that `ask` calls, all of which answer no but one."""
    called: set[int] = set()

    def noting(slot: int) -> Any:
        def answer() -> int:
            called.add(slot)
            return int(slot == yes)

        return _Answer(answer)

    answers = [noting(slot) for slot in range(_SLOTS)]
    table = (ctypes.c_void_p * _SLOTS)(*map(_address, answers))
    before = hooks.value
    hooks.value = ctypes.addressof(table)
    try:
        with suppress(RuntimeError):
            ask()
    finally:
        hooks.value = before
    return called


def _backward() -> None:
    with torch.autograd.set_multithreading_enabled(False):
        x = DeviceTensor(torch.ones(1), Traffic()).requires_grad_()
        (x * x).sum().backward()


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address
