"""Count the bytes of all tensors that are alive, operation by operation.

Every tensor lies in a storage, which views share. A dispatch mode sees what each operation returns; a
storage seen for the first time is counted until its last owner lets it go, which a weak reference tells.
So `now` is exact at any time, its largest value is the peak, and neither depends on an allocator. Under
`FakeTensorMode` the same holds of a computation that never happens.

What it does not see: what a kernel takes for itself while it runs, and what an allocator holds beyond
what it gave out. torch's own `MemTracker` fails on frozen parameters (2.13), and cannot tell a tensor
that autograd keeps from one that a variable holds.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

SAVED = "saved for backward"
OTHER = "other"


@dataclass
class Peak:
    """The most that was alive at once, and what it was.

    Attributes:
        total: bytes.
        kinds: the same by kind; a kind is what `LiveBytes.mark` called it, `SAVED` or `OTHER`.
    """

    total: int = 0
    kinds: dict[str, int] = field(default_factory=dict[str, int])


@dataclass
class _Known:
    nbytes: int
    kind: str
    reference: Any


class LiveBytes(TorchDispatchMode):
    """A dispatch mode that counts; enter it inside of a `FakeTensorMode`, if there is one.

    Attributes:
        now: bytes of the storages alive.
        peak: the most that there were.
        phases: the same within each `phase`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = Peak()
        self.phases: dict[str, Peak] = {}
        self._kinds: dict[str, int] = {}
        self._known: dict[int, _Known] = {}
        self._phase: Peak | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in tree_iter(made):
            if isinstance(value, Tensor):
                self._count(value, OTHER)
        if not _adds_up_gradients(func):
            self._look()
        return made

    def mark(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what some tensors are; those that no operation made are counted from now on."""
        for tensor in tensors:
            known = self._count(tensor, kind)
            if known is not None and known.kind != kind:
                self._kinds[known.kind] -= known.nbytes
                self._kinds[kind] = self._kinds.get(kind, 0) + known.nbytes
                known.kind = kind
        self._look()

    def ignore(self, tensor: Tensor) -> None:
        """Count a tensor as nothing from now on: it lies in a mapped file, whose pages come and go."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known:
            self._known[key] = _Known(0, OTHER, weakref.ref(storage, self._forget(key)))

    def of(self, kind: str) -> int:
        """Bytes alive of one kind."""
        return self._kinds.get(kind, 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Give what happens inside a peak of its own; of a phase entered twice, the larger."""
        self._phase = self.phases.setdefault(name, Peak())
        self._look()
        try:
            yield
        finally:
            self._phase = None

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Mark what autograd keeps of the operations inside, unless it is marked already."""

        def pack(tensor: Tensor) -> Tensor:
            known = self._of(tensor)
            if known is None or known.kind == OTHER:
                self.mark([tensor], SAVED)
            return tensor

        with saved_tensors_hooks(pack, _same):
            yield

    def _of(self, tensor: Tensor) -> _Known | None:
        return self._known.get(id(tensor.untyped_storage()))

    def _count(self, tensor: Tensor, kind: str) -> _Known | None:
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        key, nbytes = id(storage), storage.nbytes()
        if key in self._known:
            return self._known[key]
        self._known[key] = known = _Known(nbytes, kind, weakref.ref(storage, self._forget(key)))
        self.now += nbytes
        self._kinds[kind] = self._kinds.get(kind, 0) + nbytes
        return known

    def _forget(self, key: int) -> Callable[[object], None]:
        def gone(_: object) -> None:
            known = self._known.pop(key)
            self.now -= known.nbytes
            self._kinds[known.kind] -= known.nbytes

        return gone

    def _look(self) -> None:
        for peak in (self.peak, self._phase):
            if peak is not None and self.now > peak.total:
                peak.total, peak.kinds = self.now, {k: n for k, n in self._kinds.items() if n}


def _adds_up_gradients(func: Any) -> bool:
    """Return whether autograd's engine is adding a gradient to one that arrived before.

    Without a dispatch mode it adds in place; with one it makes a sum, and lets go of both afterwards.
    """
    in_engine = torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()  # pyright: ignore
    return in_engine and func is torch.ops.aten.add.Tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor
