"""A model's blocks by what is in them: equal ones are counted once and multiplied."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

from emloc.planning.operations import Layer
from emloc.planning.step import BlockKind, StepTape
from emloc.planning.tape import Sized

BlockLayers = Mapping[str, Layer]
"""A block's layers by their names in it."""

RunBlock = Callable[..., list[Sized]]
"""Runs a block of those layers on the tensors that blocks hand on."""


def kind_of(layers: BlockLayers) -> BlockKind:
    """The same for blocks whose layers have the same names and shapes."""
    return tuple((name, layer.d_out, layer.d_in) for name, layer in layers.items())


def by_block(layers: Mapping[str, Layer], blocks: Sequence[str]) -> list[BlockLayers]:
    """The layers of each block, named as the block names them, groups as well."""
    layers_of: dict[str, dict[str, Layer]] = {block: {} for block in blocks}
    for name, layer in layers.items():
        block = _block_of(name, layers_of)
        if block is not None:
            group = layer.group.removeprefix(f"{block}.")
            layers_of[block][name.removeprefix(f"{block}.")] = replace(layer, group=group)
    return list(layers_of.values())


def _block_of(name: str, blocks: Container[str]) -> str | None:
    while name:
        name = name.rpartition(".")[0]
        if name in blocks:
            return name
    return None


def stack(
    tape: StepTape,
    blocks: Sequence[BlockLayers],
    run: RunBlock,
    checkpointing: bool,
    state: list[Sized],
) -> list[Sized]:
    """Blocks one after another, runs of equal ones at once; `state` is emptied."""

    def reached(layers: BlockLayers, *state: Sized) -> list[Sized]:
        tape.reach_block(kind_of(layers))
        return run(layers, *state)

    for layers, same in groupby(blocks):
        block = partial(reached, layers)
        kept = partial(tape.checkpoint, block) if checkpointing else block
        state = tape.repeat(kept, len(list(same)), state)
    return state
