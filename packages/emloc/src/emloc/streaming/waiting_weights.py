"""Weights that wait on disk or in the machine's memory until their unit's turn comes.

While a unit computes, the one that is needed next is read on a thread of its own: from the mapped file, or
from memory; converted, and sent to the device on a stream of its own if that is a GPU. So a unit's weights
are there when they are needed, unless reading takes longer than computing; and two units are held at a time.

On a GPU what Python takes for done may still be computing, and the room of a unit that Python has let go of
is given to the next one. So that room belongs to the computing stream, which waits for the copies into it,
and the copies wait for what was being computed when they were asked for.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from emloc.layers.coded_weight import CodedWeight
from emloc.machine.pinned import pinned
from emloc.streaming.coded_blocks import coded
from emloc.streaming.stream import Place, UnitStream

Medium = Literal["disk", "ram"]
"""Disk or memory, where something waits."""


class WaitingWeights:
    """The weights of a stream's units, each for as long as it is needed.

    Args:
        place: `disk`: they are read whenever they are needed; `ram`: once, and copied from there.
        bits: 4 or 8: blocks' matrices wait in memory in so many bits; None: as stored.
    """

    def __init__(self, stream: UnitStream, place: Medium, bits: int | None = None) -> None:
        self._stream, self._bits = stream, bits
        self._in_memory: dict[str, list[Tensor | CodedWeight]] | None = None
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._ahead: tuple[str, Future[list[Tensor]]] | None = None
        self._on_gpu = stream.device.type == "cuda"
        self._copies = torch.cuda.Stream(stream.device) if self._on_gpu else None
        if place == "ram":
            self._in_memory = {}
            for unit in stream.units:
                self._in_memory[unit] = self._read(unit)

    @contextmanager
    def fill(self, unit: str, following: str | None) -> Iterator[None]:
        """Hold a unit's weights inside; meanwhile the unit that is needed next is read.

        Raises:
            CheckpointError: a weight is missing, or not of the shape that the config implies.
        """
        values = self._take(unit)
        if following is not None:
            room = self._room(following)
            self._ahead = following, self._pool.submit(self._get, following, room)
        with self._stream.holding(unit, values):
            yield

    def _take(self, unit: str) -> list[Tensor]:
        ahead, self._ahead = self._ahead, None
        values: list[Tensor] = []
        if ahead is not None:
            # Also where it is of no use, so that it is not held any longer.
            values = ahead[1].result()
            self._wait_for_copies()
        if ahead is None or ahead[0] != unit:
            values.clear()
            values = self._get(unit, self._room(unit))
            self._wait_for_copies()
        return values

    def _room(self, unit: str) -> list[Tensor]:
        """Room on a GPU for a unit, into which copies may go once what is being computed now is done."""
        stream = self._stream
        if self._copies is None:
            return []
        room = [
            torch.empty(place.shape, dtype=place.dtype, device=stream.device)
            for place in stream.places[unit]
        ]
        self._copies.wait_stream(torch.cuda.current_stream(stream.device))
        return room

    def _wait_for_copies(self) -> None:
        if self._copies is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._copies)

    def _get(self, unit: str, room: list[Tensor]) -> list[Tensor]:
        stream = self._stream
        on_disk = self._in_memory is None
        held = self._read(unit) if self._in_memory is None else self._in_memory[unit]
        if self._copies is None:  # a view into a mapped file would be read when it is used
            places = stream.places[unit]
            return [self._dense(value, place, on_disk) for value, place in zip(held, places)]
        with torch.no_grad(), torch.cuda.stream(self._copies):
            for value, into in zip(held, room):
                self._send(value, into)
        return room

    def _dense(self, value: Tensor | CodedWeight, place: Place, copy: bool) -> Tensor:
        """A weight as it computes, on the CPU."""
        if isinstance(value, CodedWeight):
            return value.dense(place.dtype).view(place.shape)
        return value.to(place.dtype, copy=copy)

    def _send(self, value: Tensor | CodedWeight, into: Tensor) -> None:
        """The same on a GPU; a conversion is made there, of what was stored."""
        if isinstance(value, CodedWeight):
            here = value.to(into.device)
            here.dense(into.dtype, into.view(-1, here.columns))
        elif value.dtype == into.dtype:
            into.copy_(value, non_blocking=True)
        else:
            into.copy_(value.to(into.device, non_blocking=True))

    def _read(self, unit: str) -> list[Tensor | CodedWeight]:
        """A unit's weights as they wait, pinned where a GPU copies them while it computes."""
        tensors = [self._stream.tensor(p.name, p.shape) for p in self._stream.places[unit]]
        in_few_bits = self._bits is not None and unit in self._stream.blocks
        return [self._waiting(tensor, in_few_bits) for tensor in tensors]

    def _waiting(self, tensor: Tensor, in_few_bits: bool) -> Tensor | CodedWeight:
        if in_few_bits and self._bits is not None and tensor.dim() > 1:
            made = coded(tensor.to(self._stream.device), self._bits)
            return made.pinned() if self._on_gpu else made
        if self._in_memory is not None:
            return pinned(tensor) if self._on_gpu else tensor.clone()
        return tensor.contiguous().pin_memory() if self._on_gpu else tensor
