"""A model whose blocks are in memory one at a time, to train a LoRA on: exact, and flat in depth.

A step's micro-batches go through each block together, so that it is read twice, whatever their number
(`emloc.streaming.block_gradients`). What is put around layers, such as a LoRA, stays in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.extend.family import ModelFamily
from emloc.streaming.block_gradients import BlockPasses
from emloc.streaming.call import Call
from emloc.streaming.kept_inputs import InMemory, OnDisk
from emloc.streaming.lockstep import lockstep
from emloc.streaming.stream import UnitStream
from emloc.streaming.waiting_weights import Medium, WaitingWeights

Made = TypeVar("Made")

ATTRIBUTE = "emloc_streamed"


class StreamedModel:
    """A skeleton with the passes that it is trained by.

    Args:
        checkpoint: in the family's layout.
        dtype: in which units compute; None: the one that most of the checkpoint's bytes are stored in.
        weights: where blocks wait.
        bits: of blocks' matrices that wait in memory; None: as stored.
        inputs: where what enters blocks is kept in a step.
        folder: on whose disk, if there.

    Attributes:
        model: the skeleton; whoever has it finds the streamed model by `of`.
    """

    def __init__(
        self,
        family: ModelFamily,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None,
        device: str,
        weights: Medium,
        inputs: Medium,
        folder: Path,
        bits: int | None = None,
    ) -> None:
        kind = dtype or checkpoint.main_dtype
        self._stream = stream = UnitStream(family, checkpoint, device, dtype=kind)
        for places in stream.places.values():
            for place in places:
                stream.stored(place.name)  # by the names of now, before layers are wrapped
        self._weights = WaitingWeights(stream, weights, bits)
        self._kept = OnDisk(stream.device, folder) if inputs == "disk" else InMemory(stream.device)
        self.model: Any = stream.model.requires_grad_(False)
        # By a map with several entries libraries know that they must not move the model.
        self.model.hf_device_map = dict.fromkeys(stream.units, "meta")
        setattr(self.model, ATTRIBUTE, self)

    @staticmethod
    def of(model: Any) -> "StreamedModel | None":
        """The streamed model that a skeleton belongs to; None for a model that is in memory."""
        return getattr(model, ATTRIBUTE, None)

    @property
    def unit_bytes(self) -> int:
        """Bytes of the largest unit as it computes."""
        units = self._stream.places.values()
        return max((sum(p.shape.numel() * p.dtype.itemsize for p in u) for u in units), default=0)

    def computed(self, tensor: Tensor) -> Tensor:
        """A floating tensor where the model computes, and in its dtype."""
        return tensor.to(self._stream.device, self._stream.dtype)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Let weights look as if they were on the device, each a single number that is shown many times.

        PEFT puts what it adds where the weights are.
        """
        stream, empty = self._stream, list[tuple[nn.Module, str, nn.Parameter | None]]()
        for place in (place for places in stream.places.values() for place in places):
            parameters = place.owner._parameters  # pyright: ignore[reportPrivateUsage]
            empty.append((place.owner, place.leaf, parameters[place.leaf]))
            shown = torch.zeros((), dtype=place.dtype, device=stream.device).expand(place.shape)
            parameters[place.leaf] = nn.Parameter(shown, requires_grad=False)
        try:
            yield
        finally:
            for owner, leaf, parameter in empty:
                owner._parameters[leaf] = parameter  # pyright: ignore[reportPrivateUsage]

    def units(self) -> Iterator[nn.Module]:
        """Every unit in turn, with its weights."""
        for unit in self._stream.units:
            with self._weights.fill(unit, None), torch.no_grad():
                yield self._stream.model.get_submodule(unit)

    def values(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        """Every parameter of a unit: the module that holds it, its name there, and its numbers."""
        stream = self._stream
        for unit in stream.units:
            for place, value in zip(stream.places[unit], stream.read(unit)):
                yield place.owner, place.leaf, value

    def gradients(self, losses: Sequence[Callable[[], tuple[Tensor, Made]]]) -> list[Made]:
        """Add the gradients of several losses to whatever requires them; see `BlockPasses`."""
        passes = BlockPasses(self._stream, self._weights.fill, self._kept, shown=False)
        made = passes.forward(losses)
        passes.backward(_nothing, in_parts=True)
        return made

    def run(self, calls: Sequence[Callable[[], Made]]) -> list[Made]:
        """Call things that run the model once each, all together, without gradients."""

        @contextmanager
        def visit(unit: str) -> Iterator[None]:
            with self._weights.fill(unit, self._following(unit)):
                yield

        stream, waiting = self._stream, [Call(call) for call in calls]
        return lockstep(stream.model, stream.units, waiting, visit, device=stream.device)

    def _following(self, unit: str) -> str | None:
        blocks = self._stream.blocks
        return blocks[blocks.index(unit) + 1] if unit in blocks[:-1] else None


def _nothing(block: str, module: nn.Module) -> AbstractContextManager[None]:
    return nullcontext()
