"""The origin of each tensor of a merged model.

Most are the base's own; a few have a LoRA added, or are replaced by what was trained whole. If the adapter
runs on dequantised weights, all layers that were in few bits have those. Where parameters are tied, the base
stores one tensor for several, and base + adapter often holds them apart: PEFT trains `lm_head` or
`embed_tokens` as a copy of its own, and a LoRA on one of them leaves the other alone. The merged model then
stores a tensor for each, under a config that ties nothing; that it is read back so is checked on the skeleton
of that config, and a model that cannot be stored so is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from emloc.adapters.adapted_weights import AdaptedWeights, part_weights
from emloc.adapters.rounding import RoundedBase
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_tensors import LoraLayer
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.artefacts.tensor_info import TensorInfo
from emloc.errors import MismatchError
from emloc.extend.capabilities import untied_config_of
from emloc.extend.family import ModelFamily, StoredParameter
from emloc.linalg.merging import merged_weight


@dataclass(frozen=True)
class Source:
    """The ingredients of one tensor.

    Attributes:
        place: how the base stores it.
        layer: the LoRA that is added, or None.
        whole: the adapter's tensor that takes its place, or None.
        rounded: the layer whose dequantised weight it is made of, instead of the base's; or None.
    """

    place: StoredParameter
    layer: LoraLayer | None = None
    whole: str | None = None
    rounded: str | None = None


@dataclass(frozen=True)
class MergedModel:
    """A base with an adapter, tensor by tensor.

    Attributes:
        sources: of the tensors that are not the base's as they are.
        added: tensors that the base does not have, each in the file of what it is made of.
        config: of the merged model, where it is not the base's.
        frozen: the dequantised weights that the adapter runs on, if it does not run on the base's.
    """

    base: Checkpoint
    adapter: Adapter
    sources: Mapping[str, Source]
    added: Mapping[str, TensorInfo] = field(default_factory=dict[str, TensorInfo])
    config: dict[str, Any] | None = None
    frozen: RoundedBase | None = None

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """All of them, in name order."""
        return dict(sorted({**self.base.tensors, **self.added}.items()))

    def make(self, name: str) -> Tensor:
        """One of them, in the dtype and shape that `tensors` says."""
        source, info = self.sources.get(name), self._info(name)
        if source is None:
            return self.base.read(name)
        if source.whole is not None:
            return self.adapter.read(source.whole).to(info.dtype)
        if source.layer is None and source.rounded is None:
            return self.base.read(source.place.names[0])
        merged = self._weight(source)
        if source.layer is not None:
            merged = self._with_lora(merged, source.layer)
        return (merged.T if source.place.transposed else merged).to(info.dtype).reshape(info.shape)

    def _weight(self, source: Source) -> Tensor:
        if source.rounded is None:
            return source.place.layer_weight(self.base.read)
        assert self.frozen is not None
        return self.frozen.weight(source.rounded)

    def _with_lora(self, weight: Tensor, layer: LoraLayer) -> Tensor:
        adapter = self.adapter
        magnitude = adapter.magnitude(layer.magnitude_key) if layer.magnitude_key else None
        down, up = adapter.matrix(layer.down_key), adapter.matrix(layer.up_key)
        return merged_weight(weight, down, up, layer.scaling, magnitude)

    def _info(self, name: str) -> TensorInfo:
        return self.added[name] if name in self.added else self.base.tensors[name]


def merged_part(part: Adapter, base: Checkpoint) -> MergedModel:
    """A pipeline's other model with its LoRA.

    Raises:
        MismatchError: see `part_weights`.
    """
    weights = part_weights(part, base)
    sources = {
        weights[layer.name].names[0]: Source(weights[layer.name], layer) for layer in part.layers
    }
    return MergedModel(base, part, sources)


def merged_model(
    adapted: AdaptedWeights,
    family: ModelFamily,
    model: nn.Module,
    base: Checkpoint,
    frozen: RoundedBase | None = None,
) -> MergedModel:
    """The base with its adapter.

    Args:
        model: the base's skeleton.
        frozen: its dequantised weights, if the adapter runs on those.

    Raises:
        MismatchError: a weight lies in a tensor with others, or is tied to one that the adapter leaves
            alone and cannot be stored apart from it.
    """
    changed = _changed(adapted, base, frozen)
    known = {
        name: stored
        for name, _ in model.named_parameters(remove_duplicate=False)
        if (stored := family.stored(model, name, base)) is not None
    }
    apart = _come_apart(changed, known, model, adapted.adapter)
    if not apart:
        sources = {source.place.names[0]: source for source in changed.values()}
        return MergedModel(base, adapted.adapter, sources, frozen=frozen)
    config, added = _untied(apart, known, family, model, base)
    sources = {
        (name if name in added else source.place.names[0]): source
        for name, source in changed.items()
    }
    sources |= {name: Source(known[name]) for name in added if name not in changed}
    return MergedModel(base, adapted.adapter, sources, added, config, frozen)


def _changed(
    adapted: AdaptedWeights, base: Checkpoint, frozen: RoundedBase | None
) -> dict[str, Source]:
    """The new values of the parameters that the adapter or its dequantised weights change, by parameter."""
    changed: dict[str, Source] = {}
    for name, place in frozen.places.items() if frozen is not None else ():
        if place.plain_name is None:
            raise MismatchError(
                f"{name} is part of the fused tensor {place.names[0]} in {base.name}, where its "
                f"dequantised weight cannot be stored; correct the adapter for the original (limit=none)."
            )
        changed[f"{name}.weight"] = Source(place, rounded=name)
    for layer in adapted.adapter.layers:
        place = adapted.layers[layer.name]
        if place.plain_name is None:
            raise MismatchError(
                f"{layer.name} is part of the fused tensor {place.names[0]} in "
                f"{base.name}, into which it cannot be merged; run the adapter beside the model."
            )
        parameter = f"{layer.name}.weight"
        rounded = layer.name if parameter in changed else None
        changed[parameter] = Source(place, layer, rounded=rounded)
    for name, place in adapted.whole.items():
        if place.plain_name is None or name in changed:
            raise MismatchError(
                f"Adapter {adapted.adapter.path} trained {name} whole, but {base.name} does not store it as "
                f"one tensor, or the adapter also has a LoRA on it; run the adapter beside the model."
            )
        changed[name] = Source(place, whole=adapted.adapter.saved[name])
    return changed


def _come_apart(
    changed: Mapping[str, Source],
    known: Mapping[str, StoredParameter],
    model: nn.Module,
    adapter: Adapter,
) -> dict[str, list[str]]:
    """Changed parameters that are tied to some which do not change in the same way, with those."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    apart: dict[str, list[str]] = {}
    for name, source in changed.items():
        tied = [
            other
            for other, stored in known.items()
            if other != name
            and (stored.names == source.place.names or parameters[other] is parameters.get(name))
        ]
        if not all(_same(source, changed.get(other), adapter) for other in tied):
            apart[name] = tied
    return apart


def _same(one: Source, other: Source | None, adapter: Adapter) -> bool:
    """Return whether both are replaced by the same values, as where PEFT ensures that they stay tied."""
    if other is None or one.whole is None or other.whole is None:
        return False
    return torch.equal(adapter.read(one.whole), adapter.read(other.whole))


def _untied(
    apart: Mapping[str, list[str]],
    known: Mapping[str, StoredParameter],
    family: ModelFamily,
    model: nn.Module,
    base: Checkpoint,
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config that ties nothing, and a tensor for each parameter that then has none."""
    config = untied_config_of(family, base, model)
    if config is not None:
        alone = Described(base.name, base.path, config, dict(base.tensors))
        skeleton = family.skeleton(alone, torch.float32)
        added = {
            name: base.tensors[stored.names[0]]
            for name, stored in known.items()
            if family.stored(skeleton, name, alone) is None and name not in base.tensors
        }
        if _is_read_back(apart, added, known, family, alone):
            return config, added
    name, tied = next(iter(apart.items()))
    raise MismatchError(
        f"The adapter changes {name}, whose weight is tied to {', '.join(tied)}: merging would change both, "
        f"and {type(model).__name__} cannot store them separately; train without it, or run the adapter "
        f"beside the model."
    )


def _is_read_back(
    apart: Mapping[str, list[str]],
    added: Mapping[str, TensorInfo],
    known: Mapping[str, StoredParameter],
    family: ModelFamily,
    alone: Described,
) -> bool:
    """Return whether a loader finds each parameter in the tensor that is meant for it."""
    alone = Described(alone.name, alone.path, alone.config, {**alone.tensors, **added})
    skeleton = family.skeleton(alone, torch.float32)
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, stored in known.items():
        read_back = family.stored(skeleton, name, alone)
        expected = (name,) if name in added else stored.names
        if read_back is None or read_back.names != expected:
            return False
    return not any(
        parameters[name] is parameters[other] for name, tied in apart.items() for other in tied
    )
