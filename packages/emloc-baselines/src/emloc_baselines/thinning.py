"""A language model with fewer blocks: which stay, its config, and its tensors under their new numbers.

The light model is an ordinary checkpoint of the base's architecture: blocks are numbered anew from 0, so
that layer indices, and with them the key-value cache, are those of a model of that depth; lists of the
config that say something per block keep the entries of those that stay.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from emloc.errors import CheckpointError
from emloc.streaming.stream import UnitStream
from emloc_baselines.light import Piece

DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""The names that architectures give their number of blocks."""


def uniform(count: int, kept: int) -> list[int]:
    """The blocks of `count` that stay: `round(i · (count − 1) / (kept − 1))`; of one, the middle."""
    if kept == 1:
        return [(count - 1) // 2]
    return [round(i * (count - 1) / (kept - 1)) for i in range(kept)]


def thinned_config(config: Mapping[str, Any], depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """A base's `config.json` for the blocks `kept` of its language model's `depth`.

    Raises:
        CheckpointError: it does not say its depth by a name that is known.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        text = cast("Mapping[str, Any]", inner)
        return {**config, "text_config": thinned_config(text, depth, kept)}
    if not any(config.get(name) == depth for name in DEPTHS):
        raise CheckpointError(
            f"The config of {config.get('model_type')} gives the number of blocks ({depth}) under none of "
            f"{', '.join(DEPTHS)}, so blocks cannot be removed."
        )

    def thinned(name: str, value: Any) -> Any:
        if name in DEPTHS and value == depth:
            return len(kept)
        if isinstance(value, list) and len(cast("list[Any]", value)) == depth:
            return [value[index] for index in kept]
        return value

    return {name: thinned(name, value) for name, value in config.items()}


def with_derived(config: Mapping[str, Any], model: Any, depth: int) -> dict[str, Any]:
    """A base's `config.json` with what its library works out of it for each block, such as `layer_types`.

    It would be worked out anew from the blocks' new numbers, and make blocks of other kinds of them.

    Args:
        model: of that config, with the library's own as `config`.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        text = cast("Mapping[str, Any]", inner)
        return {**config, "text_config": with_derived(text, model, depth)}
    own: Any = getattr(model, "config", None)
    known = own.get_text_config() if hasattr(own, "get_text_config") else own
    derived = {
        name: list(cast("list[Any]", value))
        for name, value in ({} if known is None else vars(known)).items()
        if isinstance(value, list)
        and len(cast("list[Any]", value)) == depth
        and config.get(name) is None
    }
    return {**config, **derived}


def block_tensors(stream: UnitStream, block: str) -> list[str]:
    """The checkpoint's tensors of a block."""
    module = stream.model.get_submodule(block)
    names = {
        name
        for path, _ in module.named_parameters()
        for name in stream.stored(f"{block}.{path}").names
    }
    return sorted(names)


def block_bytes(stream: UnitStream, block: str) -> int:
    """Bytes of a block's tensors."""
    return sum(stream.checkpoint.tensors[name].nbytes for name in block_tensors(stream, block))


def thinned_pieces(
    stream: UnitStream, blocks: Sequence[str], kept: Sequence[int]
) -> dict[str, Sequence[Piece]]:
    """The new place of each tensor of a language model's blocks."""
    numbers = {old: new for new, old in enumerate(kept)}
    base = stream.checkpoint
    pieces: dict[str, Sequence[Piece]] = {}
    for old, block in enumerate(blocks):
        for name in block_tensors(stream, block):
            if old not in numbers:
                pieces[name] = []
                continue
            info = base.tensors[name]
            renamed = _renumbered(name, block, numbers[old])
            pieces[name] = [
                Piece(renamed, info.dtype, info.shape, lambda name=name: base.read(name))
            ]
    return pieces


def _renumbered(tensor: str, block: str, number: int) -> str:
    """A tensor's name with its block's number replaced, whatever comes before the list of blocks."""
    stack, old = block.split(".")[-2:]
    renumbered, count = re.subn(
        rf"(^|\.){re.escape(stack)}\.{old}\.", rf"\g<1>{stack}.{number}.", tensor
    )
    if count != 1:
        raise CheckpointError(
            f"The name {tensor} does not contain its block's number, {block}, exactly once."
        )
    return renumbered
