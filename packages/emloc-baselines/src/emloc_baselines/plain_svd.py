"""EMLoC with an emulator that has not seen data: the best low-rank weights in Frobenius' norm.

`W_e = U Uᵀ W` with U the leading left singular vectors of W, which is `emloc.linalg.lowrank` for `G = I`:
every input direction counts alike. Ranks and groups are those of EMLoC's low-rank emulator of the same
`keep_ratio`, so that what differs is what calibration gives. For the ablation of the correction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.compression.choice import streamed_itemsize
from emloc.compression.groups import Group, make_plan
from emloc.config import StageConfig
from emloc.extend.family import EmulatorLayers
from emloc.extend.methods import NoOptions, Task
from emloc.formats.layer_format import StoredTensor, Tensors
from emloc.linalg.gram import Moments
from emloc.methods.emloc import Emloc, EmlocUncorrected
from emloc.options.compress import LOW_RANK_FORMAT
from emloc.streaming.stream import UnitStream
from emloc_baselines.light import LightModel, Piece, Source, build_light

NAME = "svd"


class PlainSvd(Emloc):
    """`Method`: corrected as EMLoC is."""

    options: type[StageConfig] = NoOptions

    def build(self, task: Task, out: Path) -> Path:
        """See `Method`; an emulator in low rank, whatever other rows have."""
        task = replace(task, compress={**task.compress, "format": LOW_RANK_FORMAT})
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
    itemsize_of = streamed_itemsize(stream, "auto")
    plan = make_plan(groups, stream.layer_shape, source.config, itemsize_of)
    pieces: dict[str, Sequence[Piece]] = {}
    for group in plan.groups:
        pieces.update(_group_pieces(stream, group))
    layers: Mapping[str, dict[str, Any]] = {
        group.owner: {
            **group.as_json(),
            "d_out": list(group.shape.d_out),
            "d_in": group.shape.d_in,
        }
        for group in plan.groups
    }
    named = EmulatorLayers([group.as_json() for group in plan.groups], None)
    return LightModel(source.family.emulator_config(source.base, named), pieces, {}, layers)


def _group_pieces(stream: UnitStream, group: Group) -> dict[str, Sequence[Piece]]:
    """The tensors that each layer's form stores under its name, by the layer's weight."""
    made: dict[tuple[str, str], Tensor] = {}

    def making(stored: StoredTensor, dtype: torch.dtype) -> Callable[[], Tensor]:
        def make() -> Tensor:
            if stored[:2] not in made:  # once per group, again only if a shard ends within it
                fitted = _fitted(stream, group)
                made.update({key: value.to(dtype).contiguous() for key, value in fitted.items()})
            return made.pop((stored.layer, stored.name))

        return make

    pieces: dict[str, list[Piece]] = {stream.weight_name(layer): [] for layer in group.layers}
    for stored in group.form.format.stored(group.shape, group.form):
        name = stream.weight_name(stored.layer)
        dtype = stored.dtype or stream.checkpoint.tensors[name].dtype
        stem = name.removesuffix("weight")
        pieces[name].append(
            Piece(f"{stem}{stored.name}", dtype, stored.shape, making(stored, dtype))
        )
    return dict(pieces)


def _fitted(stream: UnitStream, group: Group) -> Tensors:
    weights = [
        stream.stored(f"{layer}.weight").layer_weight(stream.checkpoint.read).to(stream.dtype)
        for layer in group.layers
    ]
    moments = Moments("input", group.owner)
    moments.fold(torch.eye(group.shape.d_in, dtype=stream.dtype))
    return group.form.format.fit(weights, moments, group.shape, group.form).tensors
