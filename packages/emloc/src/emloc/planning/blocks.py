"""A model's blocks by what is in them: equal ones are counted once and multiplied."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

from emloc.planning.operations import Layer
from emloc.planning.tape import Sized, Tape

BlockLayers = Mapping[str, Layer]
"""A block's layers by their names in it."""

RunBlock = Callable[..., list[Sized]]
"""Runs a block of those layers on the tensors that blocks hand on."""


def within(layers: Mapping[str, Layer], block: str) -> BlockLayers:
    """The layers of one block, named as the block names them, groups as well."""
    prefix = f"{block}."
    return {
        name.removeprefix(prefix): replace(layer, group=layer.group.removeprefix(prefix))
        for name, layer in layers.items()
        if name.startswith(prefix)
    }


def stack(
    tape: Tape, blocks: Sequence[BlockLayers], run: RunBlock, checkpointing: bool, *given: Sized
) -> list[Sized]:
    """Blocks one after another, runs of equal ones at once."""
    state = list(given)
    for layers, same in groupby(blocks):
        block = partial(run, layers)
        kept = partial(tape.checkpoint, block) if checkpointing else block
        state = tape.repeat(kept, len(list(same)), *state)
    return state
