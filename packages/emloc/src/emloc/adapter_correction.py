"""Correct a whole adapter: each layer's mismatch, the limit by the loss on data, the new tensors.

A layer's weight is read from the base's shards and its factors from the emulator's; only columns of
the LoRA's rank are kept for all layers at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, LoraLayer, weight_names
from emloc.checkpoint import Checkpoint
from emloc.config import CorrectConfig
from emloc.correction import Corrected, Mismatch, correct_up, dora_magnitude, measure, residual
from emloc.errors import NumericalError
from emloc.family import Batch
from emloc.finite import is_finite
from emloc.gram import moment_dtype
from emloc.limits import CandidateLora, losses
from emloc.manifest import Manifest
from emloc.output import ShardWriter, write_json
from emloc.progress import console, progress_bar
from emloc.stream import UnitStream

Limit = float | None
"""A factor, or None for no limit."""


@dataclass
class AdapterCorrection:
    """Measures, chooses and writes; nothing is changed before `write`.

    Attributes:
        config: the stage's options.
        stream: the base model, for names and for comparing limits.
        emulator: its factors.
        adapter: as trained on the emulator.
    """

    config: CorrectConfig
    stream: UnitStream
    emulator: Checkpoint
    adapter: Adapter

    def __post_init__(self) -> None:
        self.base = self.stream.checkpoint
        self.names = weight_names(
            self.adapter,
            lambda name: self.stream.family.tensor_name(self.stream.model, name, self.base),
            self.base,
        )
        self.mismatches: dict[str, Mismatch] = {}
        self.owners: dict[str, str] = {}

    def measure_all(self, manifest: Manifest) -> None:
        """Compare base and emulator where each LoRA reads, one layer at a time."""
        self.adapter.require_finite(
            lambda key: NumericalError(
                f"Adapter {self.adapter.path}: {key} holds NaN or infinity; training diverged, use a "
                f"lower learning rate."
            )
        )
        self.owners = {
            name: owner for owner, entry in manifest.layers.items() for name in entry["layers"]
        }
        with progress_bar("correct", len(self.adapter.layers)) as advance:
            for layer in self.adapter.layers:
                if layer.name in self.owners:
                    self.mismatches[layer.name] = self._measure(layer)
                advance(note=layer.name)

    def _factors(self, layer: str) -> tuple[Tensor, Tensor]:
        def stem(name: str) -> str:
            return self.stream.stored_name(f"{name}.weight").removesuffix("weight")

        left = self.emulator.read(f"{stem(layer)}left")
        return left, self.emulator.read(f"{stem(self.owners[layer])}right")

    def _measure(self, layer: LoraLayer) -> Mismatch:
        weight = self.base.read(self.names[layer.name])
        if not is_finite(weight):
            raise NumericalError(f"Layer {layer.name} of {self.base.name} holds NaN or infinity.")
        left, right = self._factors(layer.name)
        down, up = self.adapter.read(layer.down_key), self.adapter.read(layer.up_key)

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(self.stream.device)

        return measure(
            on_device(weight),
            on_device(left),
            on_device(right),
            on_device(down),
            on_device(up),
            layer.scaling,
        ).cpu()

    def choose(self, batches: Sequence[Batch]) -> tuple[Limit, dict[str, Any]]:
        """The limit to use, and what to report about the choice."""
        if self.config.limit != "auto":
            limit = _as_limit(self.config.limit)
            return limit, {"limit": _shown(limit)}
        candidates = list(dict.fromkeys([0.0, *map(_as_limit, self.config.limit_candidates)]))
        loras = {layer.name: self._candidates(layer, candidates) for layer in self.adapter.layers}
        found = losses(self.stream, batches, loras, len(candidates))
        best = min(range(len(candidates)), key=lambda i: found[i])
        table = {_shown(limit): loss for limit, loss in zip(candidates, found)}
        console.print(
            "limit: "
            + "  ".join(f"{name} {loss:.4f}" for name, loss in table.items())
            + f"  (loss on calibration samples; chosen: {_shown(candidates[best])})"
        )
        return candidates[best], {"limit": _shown(candidates[best]), "calibration_loss": table}

    def _candidates(self, layer: LoraLayer, limits: Sequence[Limit]) -> CandidateLora:
        mismatch = self.mismatches.get(layer.name)
        original = self.adapter.read(layer.up_key)
        ups = [
            original if mismatch is None else correct_up(mismatch, limit).up.to(original.dtype)
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
        weight = self.base.read(self.names[layer.name]) if weight is None else weight
        high = moment_dtype(weight.dtype)
        down = self.adapter.read(layer.down_key).to(high)
        return torch.addmm(weight.to(high), up.to(high), down, alpha=layer.scaling)

    def _magnitude(self, layer: LoraLayer, up: Tensor, limit: Limit) -> Tensor:
        """DoRA's magnitude for the base beside B = `up`; limit 0 leaves the adapter as it was."""
        assert layer.magnitude_key is not None
        magnitude = self.adapter.read(layer.magnitude_key)
        if layer.name not in self.owners or limit == 0.0:
            return magnitude
        left, right = self._factors(layer.name)
        high = moment_dtype(self.base.tensors[self.names[layer.name]].dtype)
        original = self.adapter.read(layer.up_key)
        emulated = self._sum(layer, original, left.to(high) @ right.to(high))
        return dora_magnitude(magnitude, self._sum(layer, up), emulated)

    def write(self, work: Path, limit: Limit) -> dict[str, dict[str, Any]]:
        """Write the adapter under `limit`; returns what happened to each layer."""
        reports: dict[str, dict[str, Any]] = {}
        infos = self.adapter.tensors.tensors
        changed: dict[str, LoraLayer] = {}
        for layer in self.adapter.layers:
            if layer.name in self.mismatches:
                changed[layer.up_key] = layer
                if layer.magnitude_key:
                    changed[layer.magnitude_key] = layer
        declared = {key: (info.dtype, info.shape) for key, info in infos.items()}
        ups: dict[str, Tensor] = {}
        with ShardWriter(work / WEIGHTS_NAME, declared) as shard:
            for key in infos:
                layer = changed.get(key)
                if layer is None:
                    shard.write(key, self.adapter.read(key))
                    continue
                if layer.name not in ups:
                    corrected = correct_up(self.mismatches[layer.name], limit)
                    ups[layer.name] = corrected.up.to(infos[layer.up_key].dtype)
                    reports[layer.name] = self._report(layer, corrected, ups[layer.name])
                up = ups[layer.name]
                shard.write(key, up if key == layer.up_key else self._magnitude(layer, up, limit))
        config = {**self.adapter.config, "base_model_name_or_path": self.base.reference_name()}
        write_json(work / CONFIG_NAME, config)
        return dict(sorted(reports.items()))

    def _report(self, layer: LoraLayer, corrected: Corrected, stored: Tensor) -> dict[str, Any]:
        mismatch = self.mismatches[layer.name]
        return {
            "rank": layer.rank,
            "scaling": layer.scaling,
            "clipped_share": corrected.clipped / layer.rank,
            "residual_before": residual(mismatch, mismatch.up),
            "residual_after": residual(mismatch, stored),
        }


def _as_limit(value: Any) -> Limit:
    return None if value == "none" else float(value)


def _shown(limit: Limit) -> str:
    return "none" if limit is None else f"{limit:g}"
