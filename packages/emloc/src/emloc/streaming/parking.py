"""Keep what suspended calls hold in host memory, where the device has memory of its own.

In lockstep all calls but one wait, each with its hidden state, masks and skips; on a GPU these would fill
the card, though it computes with one call's at a time. The tensors are held by frames of the library's
forward, which nobody can reach into; so the tensors stay and their *storages* go: when a call is suspended,
the storages of what it has made and still holds are copied to the host and freed on the device. Views and
what autograd keeps share storages, so they follow. Bytes are copied: results are the same bit for bit. Copies
go through pinned memory in the order of the stream that computes, and nothing waits for them.

What a unit is given comes back when its call is resumed, and everything else when an operation uses it: a
skip crosses once each way, however many blocks it skips. What another call or the caller uses as well (sums
over calls, a table that a module keeps) comes back to stay.

On the device remain: the weights of the unit, the model's buffers, what was made outside of calls, and what
no Python object names. Kernels that are launched past torch's dispatcher find the unit's inputs there and
what was made since; if they read other tensors of an earlier time, torch does not know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from emloc.machine.pinned import to_pinned
from emloc.streaming.call import Call, current_call

Storage = torch.UntypedStorage


@dataclass(frozen=True)
class _Away:
    """A storage that was freed on the device, its bytes in pinned memory, and the call that holds it."""

    storage: Storage
    bytes: Tensor
    call: Call


class Parking(TorchDispatchMode):
    """Watch what calls make and use on a device, from entering to leaving; in the end everything is there.

    Args:
        device: whose tensors go to the host.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._on, self._device = device, device.type
        self._made: dict[Call, list[ref[Tensor]]] = {}
        self._away: dict[int, _Away] = {}
        self._shared: dict[int, ref[Tensor]] = {}
        self._moving = False

    @contextmanager
    def running(self, call: Call) -> Iterator[None]:
        """Note what a call makes while inside; if it is suspended then, that goes to the host."""
        self._made.setdefault(call, [])
        yield
        if not call.dead:
            self._send_away(call)

    def use(self, tree: Any) -> None:
        """Bring back what is used."""
        for tensor in self._here(tree) if self._away else ():
            key = _key(tensor)
            if key in self._away:
                if self._away[key].call is not current_call():
                    self._shared[key] = ref(tensor)
                self._bring_back(key)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Bring back what is used, and note what is made."""
        kwargs = kwargs or {}
        if self._moving:  # a storage is copied by an operation on tensors, which comes by here
            return func(*args, **kwargs)
        self.use((args, kwargs))
        made = func(*args, **kwargs)
        call = current_call()
        if call is not None:
            self._made.setdefault(call, []).extend(map(ref, self._here(made)))
        return made

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Bring everything back; where that fails, as it may after running out of memory, stop watching."""
        try:
            self._forget_dead()
            for key in list(self._away):
                self._bring_back(key)
        finally:
            self._away.clear()
            super().__exit__(kind, problem, trace)

    def _send_away(self, call: Call) -> None:
        self._forget_dead()
        alive = [tensor for made in self._made[call] if (tensor := made()) is not None]
        self._made[call] = list(map(ref, alive))
        for tensor in alive:
            key, storage = _key(tensor), tensor.untyped_storage()
            if key in self._away or not storage.nbytes() or not storage.resizable():
                continue
            if key in self._shared and self._shared[key]() is not None:
                continue
            with self._move():
                there = self._bytes_of(storage)
                self._away[key] = _Away(storage, to_pinned(there), call)
                del there
                storage.resize_(0)

    def _forget_dead(self) -> None:
        """Let go of what no tensor holds any more, and the graph neither: nothing can ask for it back."""
        uses = torch._C._storage_Use_Count  # pyright: ignore
        dead = [key for key, away in self._away.items() if uses(away.storage._cdata) == 1]  # pyright: ignore
        for key in dead:
            del self._away[key]

    def _bring_back(self, key: int) -> None:
        away = self._away[key]
        with self._move():
            away.storage.resize_(away.bytes.numel())  # before the bytes are let go: it may fail
            self._bytes_of(away.storage).copy_(away.bytes, non_blocking=True)
        del self._away[key]

    def _bytes_of(self, storage: Storage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._on).set_(storage)

    @contextmanager
    def _move(self) -> Iterator[None]:
        self._moving = True
        try:
            yield
        finally:
            self._moving = False

    def _here(self, tree: Any) -> list[Tensor]:
        return [
            leaf
            for leaf in tree_leaves(tree)
            if isinstance(leaf, Tensor) and leaf.device.type == self._device
        ]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
