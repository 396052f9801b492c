"""Give a skeleton the weights of one unit at a time.

Units are the blocks and every other module with weights of its own, together with what is inside it.
Single weights of a module that holds blocks (a token that separates images) are few and stay loaded.
Embedding tables are neither loaded nor converted: rows are looked up in the memory-mapped file, where
they cost no anonymous memory, and the result is converted.

Precision: units run in float32 (float64 for a float64 checkpoint), whatever the checkpoint stores, unless
another dtype is asked for. What the skeleton has in a wider one (routers' biases, of which transformers
keeps some in float32 always) stays in that.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError
from emloc.extend.family import ModelFamily, StoredParameter
from emloc.linalg.convolution import as_matrix
from emloc.linalg.gram import moment_dtype
from emloc.streaming.table_on_file import read_rows


class Place(NamedTuple):
    """A parameter of a unit.

    Attributes:
        owner: the module that holds it; it stays the same where others are put around it.
        leaf: its name there.
        name: the parameter's name in the skeleton.
        shape: as the config implies.
        dtype: what it computes in.
    """

    owner: nn.Module
    leaf: str
    name: str
    shape: torch.Size
    dtype: torch.dtype


class UnitStream:
    """A family's skeleton whose units can be filled from a checkpoint and emptied again.

    Attributes:
        model: the skeleton.
        blocks: the repeated units in forward order.
        units: all names to rendezvous at, blocks included.
        dtype: what units compute in, but for what the skeleton has in a wider one.
        instead: parameters that replace the checkpoint's.
        places: the parameters of every unit, but for tables on file.
    """

    def __init__(
        self,
        family: ModelFamily,
        checkpoint: Checkpoint,
        device: str = "cpu",
        instead: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.instead = instead or {}
        stored = {
            info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point
        }
        precise = moment_dtype(torch.float64 if torch.float64 in stored else torch.float32)
        self.dtype = dtype or precise
        self.device = torch.device(device)
        self.checkpoint = checkpoint
        self.family = family
        self.model = family.skeleton(checkpoint, self.dtype)
        self.blocks = list(family.blocks(self.model))
        self._entries: dict[str, StoredParameter] = {}
        self.units = [*self.blocks, *self._strays()]
        self.places = {unit: self._places_of(unit) for unit in self.units}
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):  # stays on the CPU with its table
                continue
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)  # pyright: ignore[reportPrivateUsage]
        self._fill_buffers()

    def stored(self, parameter: str) -> StoredParameter:
        """Find how the checkpoint stores a parameter.

        Raises:
            CheckpointError: it holds no such tensor.
        """
        entry = self._entries.get(parameter)
        entry = entry or self.family.stored(self.model, parameter, self.checkpoint)
        if entry is None:
            raise CheckpointError(
                f"Checkpoint {self.checkpoint.name} holds no tensor for {parameter}: its config.json "
                f"and shards do not belong together."
            )
        self._entries[parameter] = entry
        return entry

    def layer_shape(self, layer: str) -> tuple[int, ...] | None:
        """`(d_out, d_in)` of a layer's weight, `(d_out, channels, height, width)` of a convolution's.

        None if it is not stored as one tensor.
        """
        stored = self.stored(f"{layer}.weight")
        if stored.plain_name is None:
            return None
        shape = tuple(self.model.get_parameter(f"{layer}.weight").shape)
        return shape[::-1] if stored.transposed else shape

    def weight_name(self, layer: str) -> str:
        """The checkpoint's tensor of a layer's weight, which is stored plainly."""
        name = self.stored(f"{layer}.weight").plain_name
        assert name is not None
        return name

    def weight(self, layer: str) -> Tensor:
        """A filled layer's weight, d_out × d_in."""
        weight = as_matrix(self.model.get_parameter(f"{layer}.weight").detach())
        return weight.T if self.stored(f"{layer}.weight").transposed else weight

    def tensor(self, parameter: str, expected: torch.Size) -> Tensor:
        """A parameter as the checkpoint stores it.

        Raises:
            CheckpointError: missing, or not of the shape that the config implies.
        """
        stored = self.stored(parameter)
        if parameter in self.instead:
            return self.instead[parameter]
        tensor = stored.read(self.checkpoint.read)
        if tensor.shape != expected:
            raise CheckpointError(
                f"Tensor {stored.names[0]} of {self.checkpoint.name} is {tuple(tensor.shape)}, but its "
                f"config.json implies {tuple(expected)}; config and shards do not belong together."
            )
        return tensor

    def read(self, unit: str, instead: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """The parameters of a unit, in the order of `places`, as they compute.

        Args:
            instead: parameters that replace the checkpoint's, in the shapes of theirs.
        """
        others = instead or {}
        return [
            (
                others[place.name] if place.name in others else self.tensor(place.name, place.shape)
            ).to(self.device, place.dtype)
            for place in self.places[unit]
        ]

    def prefetch(self, unit: str) -> None:
        """Have the system read a unit's weights while something else is computed."""
        self.checkpoint.prefetch(
            name for place in self.places[unit] for name in self.stored(place.name).names
        )

    @contextmanager
    def filled(self, unit: str, instead: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Hold the unit's weights inside the block; the block that follows is read ahead.

        Args:
            instead: see `read`.
        """
        with self.holding(unit, self.read(unit, instead)):
            if unit in self.blocks[:-1]:
                self.prefetch(self.blocks[self.blocks.index(unit) + 1])
            yield

    @contextmanager
    def holding(self, unit: str, values: list[Tensor]) -> Iterator[None]:
        """Hold these weights in a unit; the list is emptied, so that nothing else holds them."""
        emptied: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        try:
            for place in reversed(self.places[unit]):
                parameters = place.owner._parameters  # pyright: ignore[reportPrivateUsage]
                emptied.append((place.owner, place.leaf, parameters[place.leaf]))
                parameters[place.leaf] = nn.Parameter(values.pop(), requires_grad=False)
            yield
        finally:
            for owner, leaf, parameter in emptied:
                owner._parameters[leaf] = parameter  # pyright: ignore[reportPrivateUsage]

    def _places_of(self, unit: str) -> list[Place]:
        module = self.model.get_submodule(unit)
        return [
            Place(owner, leaf, f"{unit}.{path}", parameter.shape, self._computed(parameter))
            for path, parameter in module.named_parameters(remove_duplicate=False)
            for owner, leaf in [_owner(module, path)]
            if unit in self.blocks or not isinstance(owner, nn.Embedding)  # those are on file
        ]

    def _computed(self, tensor: Tensor) -> torch.dtype:
        """The dtype that a floating tensor of the skeleton computes in."""
        return tensor.dtype if tensor.dtype.itemsize > self.dtype.itemsize else self.dtype

    def _fill_buffers(self) -> None:
        """Read the buffers that the checkpoint stores (few and small); they stay.

        Those that a model never stores are its own, whatever older files hold.
        """
        for name, buffer in list(self.model.named_buffers()):
            owner, leaf = _owner(self.model, name)
            if leaf in owner._non_persistent_buffers_set:  # pyright: ignore[reportPrivateUsage]
                continue
            stored = self.family.stored(self.model, name, self.checkpoint)
            if stored is not None:
                value = stored.read(self.checkpoint.read)
                dtype = self._computed(buffer) if buffer.is_floating_point() else buffer.dtype
                owner._buffers[leaf] = value.to(self.device, dtype)  # pyright: ignore[reportPrivateUsage]

    def _strays(self) -> list[str]:
        """Outermost modules outside of the blocks with parameters of their own; tables go on file."""
        strays: list[str] = []
        for name, module in self.model.named_modules():
            if _inside(name, self.blocks) or not any(
                True for _ in module.parameters(recurse=False)
            ):
                continue
            if isinstance(module, nn.Embedding):
                self._keep_on_file(name, module)
            elif any(_inside(block, [name]) for block in self.blocks):
                self._keep_loaded(name, module)
            elif not _inside(name, strays):
                strays.append(name)
        return strays

    def _keep_loaded(self, name: str, module: nn.Module) -> None:
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            value = self.tensor(f"{name}.{leaf}" if name else leaf, parameter.shape)
            value = value.to(self.device, self._computed(parameter))
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)  # pyright: ignore[reportPrivateUsage]

    def _keep_on_file(self, name: str, module: nn.Embedding) -> None:
        table = self.tensor(f"{name}.weight", module.weight.shape)
        module.weight = nn.Parameter(table, requires_grad=False)
        read_rows(module, self.device, self.dtype)


def _inside(name: str, modules: Sequence[str]) -> bool:
    """Return whether a module is one of `modules` or inside one."""
    return any(name == module or name.startswith(f"{module}.") or not module for module in modules)


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that holds a parameter, and the parameter's name there."""
    parent, _, leaf = path.rpartition(".")
    return module.get_submodule(parent), leaf
