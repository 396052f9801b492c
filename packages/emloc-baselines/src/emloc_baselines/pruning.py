"""The pruned model's tensors, and how many heads and neurons fit a budget.

Key-value heads are few and large, neurons many and small: every pruned block keeps about the same number
of heads, rounded from the share that the budget leaves, and neurons fill what is then left, so that the
whole lies below the budget by less than one neuron.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from emloc.errors import CheckpointError, ConfigError
from emloc.streaming.stream import UnitStream
from emloc_baselines.kept import Kept, Slice
from emloc_baselines.light import LightModel, Piece, Source
from emloc_baselines.pruned_format import pruned_config
from emloc_baselines.structures import Structures


class Sizes(NamedTuple):
    """The structures that a block keeps, or what one more of each costs in bytes."""

    groups: int
    neurons: int


class Part(NamedTuple):
    """A tensor of the base, of which a part stays."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    part: Slice


def sliced_parts(stream: UnitStream, kept: Kept) -> Iterator[Part]:
    """The tensors of a block's layers and norms, as they will be.

    Raises:
        CheckpointError: one is not stored as a tensor of its own.
    """
    model = stream.model
    slices = kept.slices()
    wanted = {f"{layer}.weight": kept_part for layer, kept_part in slices.items()}
    for layer, kept_part in slices.items():
        if getattr(model.get_submodule(layer), "bias", None) is not None:
            wanted[f"{layer}.bias"] = Slice(kept_part.rows, None)
    norms = {n: model.get_parameter(f"{n}.weight") for n, _ in kept.structures.attention.norms}
    sizes = {norm: weight.numel() for norm, weight in norms.items()}
    for norm, left in kept.norm_slices(sizes).items():
        wanted[f"{norm}.weight"] = Slice(left, None)
    for parameter, part in wanted.items():
        name = stream.stored(parameter).plain_name
        if name is None:
            raise CheckpointError(
                f"{parameter} is part of a fused tensor in {stream.checkpoint.name}, from which nothing can "
                f"be removed."
            )
        info = stream.checkpoint.tensors[name]
        shape = list(info.shape)
        for axis, indices in enumerate(part):
            if indices is not None:
                shape[axis] = len(indices)
        yield Part(name, info.dtype, tuple(shape), part)


def sliced_bytes(stream: UnitStream, kept: Kept) -> int:
    """Bytes of what is left of a block's sliced tensors."""
    return sum(prod(part.shape) * part.dtype.itemsize for part in sliced_parts(stream, kept))


def prices(stream: UnitStream, structures: Structures) -> Sizes:
    """Bytes that a key-value head (with its query heads) and a neuron of a block take."""
    whole = Kept.everything(structures)
    first = torch.arange(1)
    one_head = Kept(structures, first, whole.dims, whole.neurons)
    one_neuron = Kept(structures, whole.groups, whole.dims, first)
    total = sliced_bytes(stream, whole)
    groups, neurons = structures.attention.groups, structures.mlp.neurons
    return Sizes(
        (total - sliced_bytes(stream, one_head)) // max(1, groups - 1),
        (total - sliced_bytes(stream, one_neuron)) // max(1, neurons - 1),
    )


def fit(structures: Sequence[Structures], price: Sequence[Sizes], excess: int) -> list[Sizes]:
    """The structures that each block keeps, so that all together save `excess` bytes and less than a neuron
    more.

    Raises:
        ConfigError: even one head and one neuron per block are too much.
    """
    heads = [s.attention.groups for s in structures]
    removable = sum(
        p.groups * h + p.neurons * s.mlp.neurons for s, h, p in zip(structures, heads, price)
    )
    share = max(0.0, 1 - excess / removable)
    kept = [max(1, round(share * count)) for count in heads]

    def saved() -> int:
        return sum(p.groups * (h - k) for p, h, k in zip(price, heads, kept))

    while saved() > excess:  # rounding took out more than has to go
        index = next(i for i, (h, k) in enumerate(zip(heads, kept)) if k < h)
        kept[index] += 1
    while True:
        neurons = _fill(structures, price, excess - saved())
        if neurons is not None:
            return [Sizes(k, n) for k, n in zip(kept, neurons)]
        if max(kept) == 1:
            raise ConfigError(
                f"The budget cannot be met by pruning {len(structures)} blocks, even to one head and one "
                f"neuron each; raise keep_ratio, or protect fewer blocks."
            )
        kept = [max(1, k - 1) for k in kept]


def _fill(
    structures: Sequence[Structures], price: Sequence[Sizes], excess: int
) -> list[int] | None:
    """Neurons of each block, in equal shares; None if one each saves too little."""
    most = [s.mlp.neurons for s in structures]
    total = sum(p.neurons * count for p, count in zip(price, most))
    share = max(0.0, 1 - max(0, excess) / total)
    counts = [max(1, int(share * count)) for count in most]
    spare = total - excess - sum(p.neurons * count for p, count in zip(price, counts))
    if spare < 0:
        return None
    grows = True
    while grows:
        grows = False
        for index, (p, limit) in enumerate(zip(price, most)):
            if counts[index] < limit and p.neurons <= spare:
                counts[index] += 1
                spare -= p.neurons
                grows = True
    return counts


def pruned_model(
    source: Source, stream: UnitStream, kept: Sequence[Kept], **summary: int | float | str
) -> LightModel:
    """The light model in which each block has what is kept of it; blocks not named stay."""
    pieces: dict[str, Sequence[Piece]] = {}
    for part in (part for block in kept for part in sliced_parts(stream, block)):

        def make(part: Part = part) -> Tensor:
            return part.part.of(source.base.read(part.name)).contiguous()

        pieces[part.name] = [Piece(part.name, part.dtype, part.shape, make)]
    layers = {k.structures.block: {"kept": k.as_json()} for k in kept}
    return LightModel(pruned_config(source.base.config, kept), pieces, summary, layers)
