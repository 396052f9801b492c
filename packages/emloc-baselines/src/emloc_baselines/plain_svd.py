"""EMLoC with an emulator that has not seen data: the best low-rank weights in Frobenius' norm.

`W_e = U Uᵀ W` with U the leading left singular vectors of W, which is `emloc.linalg.lowrank` for `G = I`:
every input direction counts alike. Ranks, groups and format are those of EMLoC's emulator of the same
`keep_ratio`, so that what differs is what calibration gives. For the ablation of the correction.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.compression.groups import Group, make_plan
from emloc.config import StageConfig
from emloc.extend.family import EmulatorLayers
from emloc.extend.methods import NoOptions, Task
from emloc.linalg.gram import Moments
from emloc.linalg.lowrank import factorise
from emloc.methods.emloc import Emloc, EmlocUncorrected
from emloc.streaming.stream import UnitStream
from emloc_baselines.light import LightModel, Piece, Source, build_light

NAME = "svd"


class PlainSvd(Emloc):
    """`Method`: corrected as EMLoC is."""

    options: type[StageConfig] = NoOptions

    def build(self, task: Task, out: Path) -> Path:
        """See `Method`; an emulator of EMLoC's own format."""
        return build_light(NAME, task, out, NoOptions(), svd_emulator, False, own_format=False)


class PlainSvdUncorrected(EmlocUncorrected):
    """`Method`: the same without correction."""

    def build(self, task: Task, out: Path) -> Path:
        """See `PlainSvd`."""
        return PlainSvd().build(task, out)


def svd_emulator(source: Source) -> LightModel:
    """Factors in place of every weight that EMLoC would compress."""
    stream = UnitStream(source.family, source.base, source.config.device)
    groups = source.family.layer_groups(stream.model)
    plan = make_plan(groups, stream.layer_shape, source.config)
    pieces: dict[str, Sequence[Piece]] = {}
    for group in plan.groups:
        pieces.update(_factor_pieces(stream, group))
    layers: Mapping[str, dict[str, Any]] = {
        group.owner: {
            "layers": list(group.layers),
            "rank": group.rank,
            "d_out": list(group.d_out),
            "d_in": group.d_in,
        }
        for group in plan.groups
    }
    named = EmulatorLayers([(group.layers, group.rank) for group in plan.groups], None)
    return LightModel(source.family.emulator_config(source.base, named), pieces, {}, layers)


def _factor_pieces(stream: UnitStream, group: Group) -> dict[str, Sequence[Piece]]:
    """By each layer's weight its left factor, the owner's right one before it."""
    made: dict[str, Tensor] = {}
    names = [stream.weight_name(layer) for layer in group.layers]

    def factor(key: str) -> Callable[[], Tensor]:
        def make() -> Tensor:
            if key not in made:  # once per group, again only if a shard ends within it
                made.update(_factors(stream, group, names))
            return made.pop(key)

        return make

    pieces: dict[str, Sequence[Piece]] = {}
    for index, (name, d_out) in enumerate(zip(names, group.d_out)):
        dtype = stream.checkpoint.tensors[name].dtype
        stem = name.removesuffix("weight")
        own = [Piece(f"{stem}left", dtype, (d_out, group.rank), factor(f"{name} left"))]
        if index == 0:
            shape = (group.rank, group.d_in)
            own.insert(0, Piece(f"{stem}right", dtype, shape, factor("right")))
        pieces[name] = own
    return pieces


def _factors(stream: UnitStream, group: Group, names: Sequence[str]) -> dict[str, Tensor]:
    weights = [
        stream.stored(f"{layer}.weight").layer_weight(stream.checkpoint.read).to(stream.dtype)
        for layer in group.layers
    ]
    moments = Moments("input", group.owner)
    moments.fold(torch.eye(group.d_in, dtype=stream.dtype))
    found = factorise(weights, moments, group.rank)
    lefts = found.left.split(list(group.d_out))
    dtype = stream.checkpoint.tensors[names[0]].dtype
    factors = {"right": found.right, **{f"{n} left": left for n, left in zip(names, lefts)}}
    return {key: value.to(dtype).contiguous() for key, value in factors.items()}
