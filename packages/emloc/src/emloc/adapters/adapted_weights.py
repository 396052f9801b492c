"""The base model's weights that an adapter changes, and the check that it was made for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import MismatchError
from emloc.extend.capabilities import module_name_of
from emloc.extend.family import ModelFamily, StoredParameter
from emloc.linalg.convolution import matrix_shape

Find = Callable[[str], StoredParameter | None]
"""A function that says how the base stores a parameter, or None (`ModelFamily.stored`)."""


@dataclass(frozen=True)
class AdaptedWeights:
    """An adapter beside the base that it was made for.

    Attributes:
        adapter: under the names that the base's modules have now.
        layers: by layer name, how the base stores its weight.
        whole: by the name of a parameter that was trained whole, how the base stores it.
    """

    adapter: Adapter
    layers: dict[str, StoredParameter]
    whole: dict[str, StoredParameter]


def adapted_weights(
    adapter: Adapter, family: ModelFamily, model: nn.Module, base: Checkpoint
) -> AdaptedWeights:
    """Find what the adapter changes, all of it.

    Args:
        model: the base's skeleton.
        base: in full precision.

    Raises:
        MismatchError: a tensor of the adapter has no place in the base, or is of another shape; or a
            frozen copy of a base weight that the file holds is not the base's.
    """
    adapter = under_current_names(adapter, family, model)

    def find(parameter: str) -> StoredParameter | None:
        return family.stored(model, parameter, base)

    layers = base_weights(adapter, find, base)
    whole = _whole_parameters(adapter, model, find, base)
    _require_copies(adapter, find, base)
    return AdaptedWeights(adapter, layers, whole)


def under_current_names(adapter: Adapter, family: ModelFamily, model: nn.Module) -> Adapter:
    """The adapter with its modules called as they are now.

    Raises:
        MismatchError: two tensors of the file are of one module.
    """
    return adapter.renamed(lambda name: module_name_of(family, model, name))


def base_weights(adapter: Adapter, find: Find, base: Checkpoint) -> dict[str, StoredParameter]:
    """Layer name to how the base stores its weight, for every adapted layer.

    Raises:
        MismatchError: some layers have no weight in the base, or one of another shape; lists them.
    """
    weights: dict[str, StoredParameter] = {}
    missing: list[str] = []
    for layer in adapter.layers:
        stored = find(f"{layer.name}.weight")
        if stored is None:
            missing.append(layer.name)
            continue
        weights[layer.name] = stored
        if stored.plain_name is None:
            continue  # part of a fused tensor, whose shape tells nothing about the layer
        down, up = (
            matrix_shape(adapter.tensors.tensors[key].shape)
            for key in (layer.down_key, layer.up_key)
        )
        shape = matrix_shape(base.tensors[stored.plain_name].shape)
        shape = shape[:: -1 if stored.transposed else 1]
        if shape != (up[0], down[1]):
            raise MismatchError(
                f"Adapter {adapter.path}: {layer.name} is {up[0]}x{down[1]}, but in {base.name} it is "
                f"{'x'.join(map(str, shape))}; the adapter was trained for another base model."
            )
    if missing:
        raise MismatchError(
            f"Adapter {adapter.path}: {len(missing)} of {len(adapter.layers)} layers have no weight in "
            f"{base.name}: {_some(missing)}; the adapter was trained for another base model."
        )
    return weights


def part_weights(part: Adapter, base: Checkpoint) -> dict[str, StoredParameter]:
    """`base_weights` of a part, whose modules' names may lack a prefix that its tensors have.

    Raises:
        MismatchError: as `base_weights`, two layers are of one tensor, or the part was trained in other
            ways than by LoRA.
    """
    if part.saved:
        raise MismatchError(
            f"Adapter {part.path} trained {next(iter(part.saved))} whole, which is not supported in a "
            f"part of a pipeline; train it with LoRA alone."
        )

    def find(parameter: str) -> StoredParameter | None:
        if parameter in base.tensors:
            return StoredParameter((parameter,))
        ends = [name for name in base.tensors if name.endswith(f".{parameter}")]
        return StoredParameter((ends[0],)) if len(ends) == 1 else None

    weights = base_weights(part, find, base)
    owners: dict[str, str] = {}
    for layer, stored in weights.items():
        other = owners.setdefault(stored.names[0], layer)
        if other != layer:
            raise MismatchError(
                f"Adapter {part.path} has LoRAs on {other} and {layer}, which are both {stored.names[0]} in "
                f"{base.name}; it mixes names of two versions of the model."
            )
    _require_copies(part, find, base)
    return weights


def _whole_parameters(
    adapter: Adapter, model: nn.Module, find: Find, base: Checkpoint
) -> dict[str, StoredParameter]:
    """Find how the base stores what was trained whole."""
    stored_whole: dict[str, StoredParameter] = {}
    for name, key in adapter.saved.items():
        stored = find(name)
        if stored is None:
            raise MismatchError(
                f"Adapter {adapter.path} trained {name} whole, which {base.name} does not have; a new head "
                f"cannot be added to it, or the adapter was trained for another base model."
            )
        expected = _shape(model, name, stored, base)
        shape = adapter.tensors.tensors[key].shape
        if shape != expected:
            raise MismatchError(
                f"Adapter {adapter.path} trained {name} whole, as {_sizes(shape)}; in {base.name} it is "
                f"{_sizes(expected)}: the adapter was trained for another base model, or its vocabulary "
                f"was resized."
            )
        stored_whole[name] = stored
    return stored_whole


def _shape(
    model: nn.Module, name: str, stored: StoredParameter, base: Checkpoint
) -> tuple[int, ...]:
    if stored.plain_name is not None:
        return base.tensors[stored.plain_name].shape
    return tuple(model.get_parameter(name).shape)


def _require_copies(adapter: Adapter, find: Find, base: Checkpoint) -> None:
    """PEFT reads a copy in the file in place of the base's weight, so it has to be the same."""
    for name, key in adapter.copies.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        coded = not adapter.tensors.tensors[key].dtype.is_floating_point
        if coded and find(weight) is not None:
            continue  # whole numbers that stand for it in an emulator, and cannot have been trained
        stored = find(name)
        if stored is None or not is_copy(adapter, key, stored.read(base.read)):
            raise differs(adapter, key, name, base.name)


def is_copy(adapter: Adapter, key: str, original: torch.Tensor) -> bool:
    """Return whether a tensor of the adapter is the base's weight, perhaps rounded to another dtype."""
    copy = adapter.read(key)
    if copy.shape != original.shape:
        return False
    rounded = dict.fromkeys((copy.dtype, torch.bfloat16, torch.float16))
    return any(torch.equal(copy, original.to(kind).to(copy.dtype)) for kind in rounded)


def differs(adapter: Adapter, key: str, name: str, base: str) -> MismatchError:
    """Make the error for a tensor beside the LoRA that is no copy."""
    return MismatchError(
        f"{adapter.path / WEIGHTS_NAME} holds {key}, which belongs neither to a LoRA nor to "
        f"modules_to_save, and is not {name} of {base}; the adapter was trained for another base model, or "
        f"its vocabulary was resized."
    )


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
