"""Give a skeleton the weights of one unit at a time.

Units are the blocks and every other module with weights of its own. Embedding tables are neither
loaded nor converted: rows are looked up in the memory-mapped file, where they cost no anonymous
memory, and the result is converted.

Precision: units run in float32 (float64 for a float64 checkpoint), whatever the checkpoint stores.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from emloc.checkpoint import Checkpoint
from emloc.errors import CheckpointError
from emloc.family import ModelFamily
from emloc.gram import moment_dtype


class UnitStream:
    """A family's skeleton whose units can be filled from a checkpoint and emptied again.

    Attributes:
        model: the skeleton.
        blocks: the repeated units in forward order.
        units: all names to rendezvous at, blocks included.
        dtype: what units compute in.
    """

    def __init__(self, family: ModelFamily, checkpoint: Checkpoint, device: str = "cpu") -> None:
        stored = {
            info.dtype for info in checkpoint.tensors.values() if info.dtype.is_floating_point
        }
        self.dtype = moment_dtype(torch.float64 if torch.float64 in stored else torch.float32)
        self.device = torch.device(device)
        self.checkpoint = checkpoint
        self.family = family
        self.model = family.skeleton(checkpoint, self.dtype)
        self.blocks = list(family.blocks(self.model))
        self.units = [*self.blocks, *self._strays()]
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):  # stays on the CPU with its table
                continue
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)  # pyright: ignore[reportPrivateUsage]

    def stored_name(self, parameter: str) -> str:
        """The checkpoint's name of a parameter.

        Raises:
            CheckpointError: it holds no such tensor.
        """
        name = self.family.tensor_name(self.model, parameter, self.checkpoint)
        if name is None:
            raise CheckpointError(
                f"Checkpoint {self.checkpoint.name} holds no tensor for {parameter}: its config.json "
                f"and shards do not belong together, or the model stores it in another form (fused "
                f"experts), which is not supported."
            )
        return name

    def tensor(self, parameter: str) -> Tensor:
        """A parameter as the checkpoint stores it.

        Raises:
            CheckpointError: missing, or not of the shape that the config implies.
        """
        name = self.stored_name(parameter)
        tensor = self.checkpoint.read(name)
        expected = self.model.get_parameter(parameter).shape
        if tensor.shape != expected:
            raise CheckpointError(
                f"Tensor {name} of {self.checkpoint.name} is {tuple(tensor.shape)}, its config.json "
                f"implies {tuple(expected)}; config and shards do not belong together."
            )
        return tensor

    @contextmanager
    def filled(self, unit: str) -> Iterator[None]:
        """Hold the unit's weights inside the block."""
        module = self.model.get_submodule(unit)
        emptied: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for path, parameter in list(module.named_parameters(remove_duplicate=False)):
                owner, leaf = _owner(module, path)
                value = self.tensor(f"{unit}.{path}").to(self.device, self.dtype)
                emptied.append((owner, leaf, parameter))
                owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)  # pyright: ignore[reportPrivateUsage]
            self._fill_buffers(module, unit)
            yield
        finally:
            for owner, leaf, parameter in emptied:
                owner._parameters[leaf] = parameter  # pyright: ignore[reportPrivateUsage]

    def _fill_buffers(self, module: nn.Module, unit: str) -> None:
        """Buffers that the checkpoint stores (few and small) are read and stay."""
        for path, buffer in module.named_buffers():
            name = f"{unit}.{path}"
            if name in self.checkpoint.tensors:
                owner, leaf = _owner(module, path)
                value = self.checkpoint.read(name)
                dtype = self.dtype if value.is_floating_point() else buffer.dtype
                owner._buffers[leaf] = value.to(self.device, dtype)  # pyright: ignore[reportPrivateUsage]

    def _strays(self) -> list[str]:
        """Modules outside of the blocks with parameters of their own; embeddings become resident."""
        strays: list[str] = []
        for name, module in self.model.named_modules():
            inside = any(name == block or name.startswith(f"{block}.") for block in self.blocks)
            if inside or not any(True for _ in module.parameters(recurse=False)):
                continue
            if isinstance(module, nn.Embedding):
                self._keep_on_file(name, module)
            else:
                strays.append(name)
        return strays

    def _keep_on_file(self, name: str, module: nn.Embedding) -> None:
        table = self.tensor(f"{name}.weight")
        module.weight = nn.Parameter(table, requires_grad=False)

        def to_file(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(value.cpu() for value in inputs)

        def to_compute(_: nn.Module, __: object, output: Tensor) -> Tensor:
            return output.to(self.device, self.dtype)

        module.register_forward_pre_hook(to_file)
        module.register_forward_hook(to_compute)


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The submodule that holds a parameter, and the parameter's name there."""
    parent, _, leaf = path.rpartition(".")
    return module.get_submodule(parent), leaf
