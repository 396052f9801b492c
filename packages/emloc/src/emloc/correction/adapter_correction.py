"""Correct a whole adapter: each layer's mismatch, the limit by the loss on data, the new tensors.

A layer's weight is read from the base's shards and its stored form from the emulator's, whenever its
mismatch is wanted; nothing is kept, so memory is one layer's, however deep the model is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.adapters.adapted_weights import AdaptedWeights
from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME, LoraLayer
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import write_json
from emloc.compression.groups import Group
from emloc.config import CorrectConfig
from emloc.correction.limits import CandidateLora, losses
from emloc.errors import MismatchError, NumericalError
from emloc.extend.family import Batch
from emloc.linalg.correction import Mismatch, correct_up, dora_magnitude, measure, residual
from emloc.linalg.finite import is_finite
from emloc.linalg.gram import moment_dtype
from emloc.linalg.operator import Operator
from emloc.machine.progress import console, progress_bar
from emloc.streaming.stream import UnitStream

Limit = float | None
"""A factor, or None for no limit."""


@dataclass
class AdapterCorrection:
    """Chooses a limit and writes the adapter under it.

    Attributes:
        config: the stage's options.
        base: the original model.
        emulator: the emulator's tensors.
        groups: what the emulator compresses.
        adapted: the adapter as trained on the emulator, and what it changes in the base.
        weight_names: tensor names of the weights of compressed layers, by layer.
    """

    config: CorrectConfig
    base: Checkpoint
    emulator: Checkpoint
    groups: Sequence[Group]
    adapted: AdaptedWeights
    weight_names: Mapping[str, str]

    def __post_init__(self) -> None:
        self.device = torch.device(self.config.device)
        self.adapter, self.weights = self.adapted.adapter, self.adapted.layers
        self.groups_of = {name: group for group in self.groups for name in group.layers}
        for name in self.adapter.saved:
            if name.rpartition(".")[0] in self.groups_of:
                raise MismatchError(
                    f"Adapter {self.adapter.path} trained {name} whole, which the emulator compresses: "
                    f"what it learnt does not fit the base. Leave it out of modules_to_save, or exclude "
                    f"the layer when compressing."
                )
        self.adapter.require_finite(
            lambda key: NumericalError(
                f"Adapter {self.adapter.path}: {key} holds NaN or infinity; training diverged, use a "
                f"lower learning rate."
            )
        )

    def _emulated(self, layer: str, device: torch.device | None = None) -> Operator:
        """The emulator's weight of a compressed layer."""
        group = self.groups_of[layer]

        def read(owner: str, name: str) -> Tensor:
            stem = self.weight_names[owner].removesuffix("weight")
            return self.emulator.read(f"{stem}{name}").to(device)

        return group.form.format.operator(group.shape, group.form, layer, read)

    def _measure(self, layer: LoraLayer) -> Mismatch | None:
        """Measure how base and emulator differ where the LoRA reads; None for a dense layer."""
        if layer.name not in self.groups_of:
            return None
        weight = self.weights[layer.name].layer_weight(self.base.read)
        down, up = self.adapter.matrix(layer.down_key), self.adapter.matrix(layer.up_key)

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(self.device)

        mismatch = measure(
            on_device(weight),
            self._emulated(layer.name, self.device),
            on_device(down),
            on_device(up),
            layer.scaling,
        )
        # NaN and infinity in a weight reach every product with it.
        if not is_finite(mismatch.drift):
            raise NumericalError(
                f"Layer {layer.name} of {self.base.name}, or of the emulator, holds NaN or infinity; "
                f"check both with emloc verify."
            )
        return mismatch

    def given(self) -> tuple[Limit, dict[str, Any]]:
        """The limit that the options give, and what to report about it."""
        limit = _as_limit(self.config.limit)
        return limit, {"limit": _shown(limit)}

    def choose(self, stream: UnitStream, batches: Sequence[Batch]) -> tuple[Limit, dict[str, Any]]:
        """The limit with the least loss on calibration data, and what to report about the choice.

        Args:
            stream: the base model with the modules that the adapter trained whole.
        """
        candidates = list(dict.fromkeys([0.0, *map(_as_limit, self.config.limit_candidates)]))
        layers = {layer.name: layer for layer in self.adapter.layers}
        candidate_losses = losses(
            stream,
            batches,
            list(layers),
            lambda name: self._candidates(layers[name], candidates),
            len(candidates),
        )
        best = min(range(len(candidates)), key=lambda i: candidate_losses[i])
        table = {_shown(limit): loss for limit, loss in zip(candidates, candidate_losses)}
        console.print(
            "limit: "
            + "  ".join(f"{name} {loss:.4f}" for name, loss in table.items())
            + f"  (loss on calibration samples; chosen: {_shown(candidates[best])})"
        )
        return candidates[best], {"limit": _shown(candidates[best]), "calibration_loss": table}

    def _candidates(self, layer: LoraLayer, limits: Sequence[Limit]) -> CandidateLora:
        mismatch = self._measure(layer)
        original = self.adapter.matrix(layer.up_key)
        ups = [
            original
            if mismatch is None
            else correct_up(mismatch, limit).up.to(original.dtype).cpu()
            for limit in limits
        ]
        gains = None
        if layer.magnitude_key is not None:
            gains = [
                self._magnitude(layer, up, limit) / self._sum(layer, up).norm(dim=1)
                for up, limit in zip(ups, limits)
            ]
        return CandidateLora(self.adapter.read(layer.down_key), ups, layer.scaling, gains)

    def _sum(self, layer: LoraLayer, up: Tensor, weight: Tensor | None = None) -> Tensor:
        """`W + s·B·A` in float32 or better; `weight` stands in for the base's."""
        weight = self.weights[layer.name].layer_weight(self.base.read) if weight is None else weight
        high = moment_dtype(weight.dtype)
        down = self.adapter.matrix(layer.down_key).to(high)
        return torch.addmm(weight.to(high), up.to(high), down, alpha=layer.scaling)

    def _magnitude(self, layer: LoraLayer, up: Tensor, limit: Limit) -> Tensor:
        """DoRA's magnitude for the base beside B = `up`; limit 0 leaves the adapter as it was."""
        assert layer.magnitude_key is not None
        magnitude = self.adapter.magnitude(layer.magnitude_key)
        if layer.name not in self.groups_of or limit == 0.0:
            return magnitude
        high = moment_dtype(self.base.tensors[self.weights[layer.name].names[0]].dtype)
        original = self.adapter.matrix(layer.up_key)
        emulated = self._sum(layer, original, self._emulated(layer.name).dense(high))
        return dora_magnitude(magnitude, self._sum(layer, up), emulated)

    def write(self, work: Path, limit: Limit) -> dict[str, dict[str, Any]]:
        """Write the adapter under `limit`; returns what happened to each layer."""
        reports: dict[str, dict[str, Any]] = {}
        # Copies of the base's weights go: PEFT would read an emulator's, rounded, in the base's place.
        copies = set(self.adapter.copies.values())
        infos = {k: i for k, i in self.adapter.tensors.tensors.items() if k not in copies}
        by_key = {key: layer for layer in self.adapter.layers for key in layer.changed_keys}
        declared = {key: (info.dtype, info.shape) for key, info in infos.items()}
        last: tuple[str, Tensor] | None = None  # keys of a layer lie side by side
        with (
            ShardWriter(work / WEIGHTS_NAME, declared, str(self.adapter.path)) as shard,
            progress_bar("correct", len(self.adapter.layers)) as advance,
        ):
            for key in infos:
                layer = by_key.get(key)
                if layer is None or layer.name not in self.groups_of:
                    shard.write(key, self.adapter.read(key))
                    continue
                if last is None or last[0] != layer.name:
                    up, reports[layer.name] = self._corrected(layer, limit)
                    last = (layer.name, up)
                    advance(note=layer.name)
                up = last[1]
                changed = up if key == layer.up_key else self._magnitude(layer, up, limit)
                shard.write(key, changed.reshape(infos[key].shape))
        config = {
            **self.adapter.config,
            "base_model_name_or_path": self.base.reference_name(),
            # The emulator's layers are linear; the base's may store their weights transposed.
            "fan_in_fan_out": any(weight.transposed for weight in self.weights.values()),
        }
        write_json(work / CONFIG_NAME, config)
        return dict(sorted(reports.items()))

    def _corrected(self, layer: LoraLayer, limit: Limit) -> tuple[Tensor, dict[str, Any]]:
        """B as it will be stored, and what happened to it."""
        mismatch = self._measure(layer)
        assert mismatch is not None
        corrected = correct_up(mismatch, limit)
        stored = corrected.up.to(self.adapter.tensors.tensors[layer.up_key].dtype).cpu()
        if is_finite(corrected.up) and not is_finite(stored):
            raise NumericalError(
                f"The correction of {layer.name} does not fit {str(stored.dtype).removeprefix('torch.')}, "
                f"the dtype of {self.adapter.path}; save the adapter in bfloat16 or float32 first."
            )
        return stored, {
            "rank": layer.rank,
            "scaling": layer.scaling,
            "clipped_share": corrected.clipped / layer.rank,
            "residual_before": residual(mismatch, mismatch.up),
            "residual_after": residual(mismatch, stored.to(self.device)),
        }


def _as_limit(value: Any) -> Limit:
    return None if value == "none" else float(value)


def _shown(limit: Limit) -> str:
    return "none" if limit is None else f"{limit:g}"
