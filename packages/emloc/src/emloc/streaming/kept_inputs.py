"""Inputs of blocks, kept in host memory or on disk until the backward comes back to them; and the random
numbers that a block drew.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from emloc.machine.pinned import to_pinned


class KeptInputs(Protocol):
    """A place for tensors that are of no use for a while."""

    def put(self, tensor: Tensor) -> Any:
        """Keep a tensor; returns what `get` needs."""
        ...

    def get(self, kept: Any) -> Tensor:
        """The tensor on the device where it computes, without a graph."""
        ...

    def forget(self) -> None:
        """Let go of all."""
        ...


class InMemory:
    """Host memory, which on the CPU is where they are; a GPU copies to it and from it without waiting.

    Args:
        device: where blocks compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def put(self, tensor: Tensor) -> Tensor:
        """See `KeptInputs`."""
        return to_pinned(tensor) if tensor.is_cuda else tensor.detach().to("cpu")

    def get(self, kept: Tensor) -> Tensor:
        """See `KeptInputs`."""
        # In the order of the stream, so after the copy that brought it here.
        return kept.detach().to(self._device, non_blocking=True)

    def forget(self) -> None:
        """See `KeptInputs`; they are held by whoever put them."""


@dataclass(frozen=True)
class _OnFile:
    start: int
    shape: torch.Size
    dtype: torch.dtype


class OnDisk:
    """A file without a name, which is gone with the process, whatever ends it.

    Args:
        device: where blocks compute.
        folder: on whose disk.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self._device = device
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as this is)
        self._end = 0

    def put(self, tensor: Tensor) -> _OnFile:
        """See `KeptInputs`.

        Raises:
            OSError: the disk is full.
        """
        values = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
        place = _OnFile(self._end, tensor.shape, tensor.dtype)
        self._file.seek(place.start)
        self._file.write(cast(Any, values.numpy()))
        self._end += values.numel()
        return place

    def get(self, kept: _OnFile) -> Tensor:
        """See `KeptInputs`."""
        values = torch.empty(kept.shape, dtype=kept.dtype)
        self._file.seek(kept.start)
        self._file.readinto(cast(Any, values.flatten().view(torch.uint8).numpy()))
        return values.to(self._device)

    def forget(self) -> None:
        """See `KeptInputs`; the file is empty afterwards."""
        self._end = 0
        self._file.seek(0)
        self._file.truncate()


@dataclass(frozen=True)
class Random:
    """The state of torch's random numbers on the CPU and on a device."""

    host: Tensor
    device: torch.device
    on_device: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "Random":
        """Take down the present state."""
        card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, card)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same numbers inside, and go on afterwards as if nothing had been drawn."""
        before = Random.now(self.device)
        self._set()
        try:
            yield
        finally:
            before._set()

    def _set(self) -> None:
        torch.set_rng_state(self.host)
        if self.on_device is not None:
            torch.cuda.set_rng_state(self.on_device, self.device)
