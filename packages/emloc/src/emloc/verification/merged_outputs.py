"""A merged model against its base and its adapter: sampled outputs of every adapted layer, and all else.

A layer of base + adapter gives `W x + s·B·(A x)`, and DoRA that by `m / ‖W + s·B·A‖` row by row; the merged
model's gives `W' x`. Both are computed from the stored tensors, on some of the layer's inputs alone (columns
of the identity, which show single weights) and on random ones, where every weight has a part in every output.
They may differ by the rounding of `W'` to its dtype and by float32's of the merge:
`|Δ| ≤ eps·|W'||x| + 1e-5·(|W||x| + s·|B||A||x|)`, all in float64. Every tensor that is of no adapted layer is
compared bit by bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from emloc.adapters.adapted_weights import adapted_weights
from emloc.adapters.merged_tensors import MergedModel, Source, merged_model, merged_part
from emloc.adapters.rounding import RoundedBase, Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_tensors import LoraLayer
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import MismatchError
from emloc.extend.family import ModelFamily
from emloc.linalg.convolution import as_matrix
from emloc.machine.progress import progress_bar

COLUMNS = 16
"""Inputs of a layer that are looked at one by one."""

RANDOM = 4
"""Inputs in which all of them have a part."""

COMPUTED = 1e-5
"""The part of a sum of float32 numbers that may be lost in computing it."""


@dataclass(frozen=True)
class Compared:
    """The extent of a comparison.

    Attributes:
        outputs: vectors of outputs of adapted layers.
        tensors: compared bit by bit.
        largest: the largest difference of outputs, as a part of what rounding allows.
    """

    outputs: int = 0
    tensors: int = 0
    largest: float = 0.0

    def __add__(self, other: "Compared") -> "Compared":
        """Both together."""
        largest = max(self.largest, other.largest)
        return Compared(self.outputs + other.outputs, self.tensors + other.tensors, largest)


def compare_merged(
    merged: Checkpoint,
    base: Checkpoint,
    adapter: Adapter,
    rounding: Rounding | None,
    family: ModelFamily,
) -> Compared:
    """Compare a merged model with what it was made from.

    Args:
        adapter: with its parts.
        rounding: the dequantised weights that it runs on, or None for the base's own.

    Raises:
        MismatchError: a layer gives other outputs, or a tensor is another, is missing or was added.
    """
    model = family.skeleton(base, torch.float32)
    adapted = adapted_weights(adapter, family, model, base)
    frozen = None if rounding is None else RoundedBase.of(rounding, family, model, base)
    compared = _compare(merged, merged_model(adapted, family, model, base, frozen))
    for name, part in adapter.parts.items():
        compared += _compare(merged.part(name), merged_part(part, base.part(name)))
    return compared


def _compare(merged: Checkpoint, expected: MergedModel) -> Compared:
    wanted = expected.tensors
    for name in sorted(wanted.keys() ^ merged.tensors.keys()):
        what = "lacks" if name in wanted else "holds more than its base: "
        raise MismatchError(
            f"{merged.path} {what} {name}; it was not merged from {expected.base.name}."
        )
    draw, compared = torch.Generator().manual_seed(0), Compared()
    with progress_bar("verify outputs", len(wanted)) as advance:
        for name in wanted:
            source, tensor = expected.sources.get(name), merged.read(name)
            if source is not None and source.layer is not None:
                compared += _outputs(name, tensor, source, source.layer, expected, draw)
            elif torch.equal(tensor, expected.make(name)):
                compared += Compared(tensors=1)
            else:
                whose = expected.base.name if source is None else f"{expected.adapter.path} gives"
                raise MismatchError(f"{name} of {merged.path} is not what {whose}; merge again.")
            advance(note=name)
    return compared


def _outputs(
    name: str,
    tensor: Tensor,
    source: Source,
    layer: LoraLayer,
    expected: MergedModel,
    draw: torch.Generator,
) -> Compared:
    adapter, place = expected.adapter, source.place
    matrix = as_matrix(tensor)
    new = (matrix.T if place.transposed else matrix).double()
    if source.rounded is not None and expected.frozen is not None:
        old = expected.frozen.weight(source.rounded).double()
    else:
        old = place.layer_weight(expected.base.read).double()
    a, b = (adapter.matrix(key).double() for key in (layer.down_key, layer.up_key))
    b = layer.scaling * b
    x = _inputs(new.shape[1], draw)
    wanted, terms = old @ x + b @ (a @ x), old.abs() @ x.abs() + b.abs() @ (a.abs() @ x.abs())
    if layer.magnitude_key:
        norms = (old + b @ a).norm(dim=1)
        scale = (adapter.magnitude(layer.magnitude_key).double() / norms)[:, None]
        wanted, terms = scale * wanted, scale.abs() * terms
    allowed = torch.finfo(tensor.dtype).eps * (new.abs() @ x.abs()) + COMPUTED * terms
    excess = float(((new @ x - wanted).abs() / allowed.clamp_min(torch.finfo(x.dtype).tiny)).max())
    if not excess <= 1:
        raise MismatchError(
            f"{name} gives different outputs from {layer.name} of {expected.base.name} with {adapter.path} "
            f"(by {excess:.3g} times what rounding allows); merge again."
        )
    return Compared(outputs=x.shape[1], largest=excess)


def _inputs(count: int, draw: torch.Generator) -> Tensor:
    """Some columns of the identity, and random vectors: d_in × samples."""
    chosen = torch.randperm(count, generator=draw)[:COLUMNS]
    x = torch.randn(count, len(chosen) + RANDOM, generator=draw, dtype=torch.float64)
    x[:, : len(chosen)] = 0
    x[chosen, torch.arange(len(chosen))] = 1
    return x
