"""Which of a base model's weights an adapter changes, and that it was made for them."""

from collections.abc import Callable

from emloc.adapter import Adapter
from emloc.checkpoint import Checkpoint
from emloc.convolution import matrix_shape
from emloc.errors import MismatchError
from emloc.family import StoredParameter


def base_weights(
    adapter: Adapter, find: Callable[[str], StoredParameter | None], base: Checkpoint
) -> dict[str, StoredParameter]:
    """Layer name to how the base stores its weight, for every adapted layer.

    Args:
        find: how the base stores a parameter, or None (`ModelFamily.stored`).

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
        MismatchError: as `base_weights`, or the part was trained in other ways than by LoRA.
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

    return base_weights(part, find, base)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
