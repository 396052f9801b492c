"""Stage 3: fit a LoRA trained on an emulator to the original model, one layer at a time.

Reads a layer's weight from the base's shards and its factors from the emulator's, never a model.
With `limit="auto"` one streamed pass over the base compares the candidates on calibration samples.
"""

import time
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
from emloc.digest import batches_digest
from emloc.errors import ConfigError, MismatchError, NumericalError
from emloc.family import Batch, ModelFamily
from emloc.finite import is_finite
from emloc.gram import moment_dtype
from emloc.limits import CandidateLora, losses
from emloc.manifest import Manifest, ModelReference, same_settings, versions
from emloc.memory import PeakMemory, return_large_blocks
from emloc.output import ShardWriter, file_sha256, stage_folder, write_json
from emloc.plugins import family_named
from emloc.progress import console, progress_bar
from emloc.stage import stage
from emloc.stream import UnitStream

Limit = float | None
"""A factor, or None for no limit."""


@stage(CorrectConfig)
def correct(config: CorrectConfig) -> Path:
    """Correct an adapter for the original model; returns the new adapter's folder."""
    emulator_manifest = _emulator_manifest(config.emulator)
    adapter = Adapter.open(config.adapter)
    _refuse_foreign_adapter(adapter, config.emulator, emulator_manifest)
    base = Checkpoint.open(config.model_name_or_path or emulator_manifest.base_model.name_or_path)
    if base.digest() != emulator_manifest.base_model.digest:
        raise MismatchError(
            f"Emulator {config.emulator} was built from another model than {base.name} (it names "
            f"{emulator_manifest.base_model.name_or_path}); pass that one."
        )
    family = family_named(emulator_manifest.family)
    batches = _batches(config, family, base)
    settings = {
        **config.model_dump(
            mode="json",
            exclude={"adapter", "emulator", "output_dir", "model_name_or_path", "dataset"},
        ),
        "base_digest": emulator_manifest.base_model.digest,
        "emulator_digest": emulator_manifest.summary["emulator_digest"],
        "adapter_digest": adapter.digest(),
        "data_digest": batches_digest(batches),
    }
    if same_settings(Manifest.find(config.output_dir), settings):
        console.print(f"correct: {config.output_dir} is complete already")
        return config.output_dir
    started = time.monotonic()
    return_large_blocks()
    with stage_folder(config.output_dir, settings) as work:
        with PeakMemory(config.device) as peak:
            correction = _Correction(
                config, family, base, Checkpoint.open(config.emulator), adapter
            )
            correction.measure_all(emulator_manifest)
            chosen, summary = correction.choose(batches)
            layers = correction.write(work, chosen)
        Manifest(
            kind="corrected_adapter",
            family=family.name,
            base_model=ModelReference(
                name_or_path=base.reference_name(), digest=emulator_manifest.base_model.digest
            ),
            emulator=ModelReference(
                name_or_path=str(Path(config.emulator).absolute()),
                digest=emulator_manifest.summary["emulator_digest"],
            ),
            settings=settings,
            layers=layers,
            summary=summary,
            files={name: file_sha256(work / name) for name in (CONFIG_NAME, WEIGHTS_NAME)},
            versions=versions("emloc", "torch", "safetensors"),
            measured={"seconds": round(time.monotonic() - started, 3), **peak.figures()},
        ).write(work)
    return config.output_dir


def _emulator_manifest(emulator: str) -> Manifest:
    manifest = Manifest.read(Path(emulator))
    if manifest.kind != "emulator":
        raise MismatchError(f"{emulator} is not an emulator but a {manifest.kind}.")
    return manifest


def _refuse_foreign_adapter(adapter: Adapter, emulator: str, manifest: Manifest) -> None:
    origin = Manifest.find(adapter.path)
    if origin is None:
        _refuse_foreign_folder(adapter, emulator, manifest)
        return
    if origin.kind == "corrected_adapter":
        raise MismatchError(
            f"Adapter {adapter.path} is corrected already; correct the one that training wrote."
        )
    digest = origin.emulator.digest if origin.emulator else None
    if digest != manifest.summary["emulator_digest"]:
        trained_on = origin.emulator.name_or_path if origin.emulator else "the base model itself"
        raise MismatchError(
            f"Adapter {adapter.path} was trained on {trained_on}, not on {emulator}; pass the "
            f"emulator that it was trained on."
        )


def _refuse_foreign_folder(adapter: Adapter, emulator: str, manifest: Manifest) -> None:
    """Trained by somebody else's trainer: PEFT's config may still name what it was trained on."""
    folder = adapter.trained_on
    if folder is None or folder.resolve() == Path(emulator).resolve():
        return
    named = Manifest.find(folder)
    same = (
        named is not None
        and named.summary.get("emulator_digest") == (manifest.summary["emulator_digest"])
    )
    if not same:
        raise MismatchError(
            f"Adapter {adapter.path} was trained on {folder} by its adapter_config.json, not on "
            f"{emulator}; pass the emulator that it was trained on."
        )


def _batches(config: CorrectConfig, family: ModelFamily, base: Checkpoint) -> Sequence[Batch]:
    if config.limit != "auto":
        return []
    if config.dataset is None:
        raise ConfigError(
            "correct: limit=auto compares limits on data; pass a dataset, or a fixed limit such as 1."
        )
    return family.calibration_batches(base, config)


@dataclass
class _Correction:
    config: CorrectConfig
    family: ModelFamily
    base: Checkpoint
    emulator: Checkpoint
    adapter: Adapter

    def __post_init__(self) -> None:
        self.stream = UnitStream(self.family, self.base, self.config.device)
        self.names = weight_names(
            self.adapter,
            lambda name: self.family.tensor_name(self.stream.model, name, self.base),
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
