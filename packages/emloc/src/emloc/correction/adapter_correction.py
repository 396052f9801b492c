"""Correct a whole adapter: each layer's mismatch, the limit by the loss on data, the new tensors.

A layer's weight is read from the base's shards, and what it was while the LoRA was trained is made anew
(`emloc.adapters.frozen_weights`), whenever its mismatch is wanted; nothing is kept, so memory is one layer's,
however deep the model is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.adapters.adapted_weights import AdaptedWeights
from emloc.adapters.frozen_weights import FrozenWeights
from emloc.adapters.rounding import DEQUANTISED, RoundedBase
from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME, LoraLayer
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import write_json
from emloc.config import CorrectConfig
from emloc.correction.limits import CandidateLora, Watched, batch_losses, mean_loss
from emloc.correction.other_weights import OtherWeights
from emloc.correction.reads import Reads
from emloc.correction.ways import UNCORRECTED, Way, best_way, candidates, given_way
from emloc.errors import MismatchError, NumericalError
from emloc.extend.family import Batch
from emloc.extend.losses import LossSum
from emloc.linalg.correction import (
    Basis,
    Corrected,
    Mismatch,
    correct_up,
    data_basis,
    dora_magnitude,
    measure,
    plain_basis,
    residual,
)
from emloc.linalg.finite import is_finite
from emloc.linalg.gram import moment_dtype
from emloc.machine.progress import console, progress_bar
from emloc.streaming.stream import UnitStream


@dataclass
class AdapterCorrection:
    """Chooses a limit and writes the adapter under it.

    Attributes:
        config: the stage's options.
        base: the original model.
        frozen: the weights that the adapter was trained beside.
        adapted: the adapter as it was trained, and what it changes in the base.
        reads: sums of what the LoRAs read, for ways that need them.
    """

    config: CorrectConfig
    base: Checkpoint
    frozen: FrozenWeights
    adapted: AdaptedWeights
    reads: Reads | None = None

    def __post_init__(self) -> None:
        self.device = torch.device(self.config.device)
        self.adapter, self.weights = self.adapted.adapter, self.adapted.layers
        for name in self.adapter.saved:
            if name.rpartition(".")[0] in self.frozen.layers:
                raise MismatchError(
                    f"Adapter {self.adapter.path} trained {name} whole, which {self.frozen.changed_by}, so "
                    f"what it learnt does not fit the base. Leave it out of modules_to_save, or "
                    f"{self.frozen.exempt}."
                )
        self.adapter.require_finite(
            lambda key: NumericalError(
                f"Adapter {self.adapter.path}: {key} holds NaN or infinity; training diverged, so use a "
                f"lower learning rate."
            )
        )

    def _measure(self, layer: LoraLayer, by_data: bool = False) -> Mismatch | None:
        """Measure how both weights differ where the LoRA reads; None where they are the same.

        Args:
            by_data: in the directions that data take there, instead of all alike.
        """
        if layer.name not in self.frozen.layers:
            return None
        weight = self.weights[layer.name].layer_weight(self.base.read)
        down, up = self.adapter.matrix(layer.down_key), self.adapter.matrix(layer.up_key)

        def on_device(tensor: Tensor) -> Tensor:
            return tensor.to(self.device)

        mismatch = measure(
            on_device(weight),
            self.frozen.operator(layer.name, self.device),
            self._basis(layer, on_device(down), by_data),
            on_device(up),
            layer.scaling,
        )
        # NaN and infinity in a weight reach every product with it.
        if not is_finite(mismatch.drift):
            raise NumericalError(
                f"Layer {layer.name} of {self.base.name}, or of {self.frozen.called}, holds NaN or infinity; "
                f"check both with emloc verify."
            )
        return mismatch

    def _basis(self, layer: LoraLayer, down: Tensor, by_data: bool) -> Basis:
        if not by_data:
            return plain_basis(down)
        assert self.reads is not None
        crossed = self.reads.crossed(layer.name)
        if crossed is None:  # no sample reached the layer, so nothing is known
            crossed = down.new_zeros(down.shape[1], down.shape[0])
        return data_basis(down, crossed.to(self.device))

    def _corrected_up(
        self, mismatches: dict[bool, Mismatch | None], layer: LoraLayer, way: Way
    ) -> Corrected | None:
        """B under a way; None for a dense layer. Mismatches are measured once per kind of way."""
        if way.by_data not in mismatches:
            mismatches[way.by_data] = self._measure(layer, way.by_data)
        mismatch = mismatches[way.by_data]
        if mismatch is None:
            return None
        return correct_up(mismatch, way.limit, 1.0 if way.share is None else way.share)

    def given(
        self, stream: UnitStream | None, batches: Sequence[Batch]
    ) -> tuple[Way, dict[str, Any]]:
        """The way that the options give, and what to report about it.

        Args:
            stream: the base, where the way needs to know what the LoRA reads.
        """
        way = given_way(self.config)
        if way.by_data:
            assert stream is not None
            assert self.reads is not None
            self.reads.calls = len(batches)
            layers = {layer.name: layer for layer in self.adapter.layers}
            watched = Watched(
                self.reads, lambda name: self._candidates(layers[name], [UNCORRECTED])
            )
            batch_losses(stream, batches, list(layers), watched.original, [0], watched)
        return way, {"limit": way.shown, **self._runs_on(way)}

    def choose(
        self, stream: UnitStream, batches: Sequence[Batch], at_once: int | None = None
    ) -> tuple[Way, dict[str, Any]]:
        """The best way by the loss on calibration data, and what to report about the choice.

        What the LoRA reads is summed over every other micro-batch; ways are compared on those between, and
        the best must not be worse than none on the former. Where one half has no labels, all serve for both.

        Args:
            stream: the base model with the modules that the adapter trained whole.
            at_once: ways that run together through one pass; all by default.
        """
        ways = candidates(self.config)
        layers = {layer.name: layer for layer in self.adapter.layers}
        # Families give the longest samples first, or one data set after another: halves are to be alike.
        batches = [*batches[::2], *batches[1::2]]
        half = -(-len(batches) // 2)
        watched = None
        if any(way.by_data for way in ways):
            assert self.reads is not None
            self.reads.calls = half
            watched = Watched(
                self.reads, lambda name: self._candidates(layers[name], [UNCORRECTED])
            )
        parts: list[list[LossSum]] = []
        size = at_once or len(ways)
        for start in range(0, len(ways), size):
            some = ways[start : start + size]
            parts += batch_losses(
                stream,
                batches,
                list(layers),
                partial(self._candidates_of, layers, some),
                range(len(some)),
                watched if start == 0 else None,
                self._dequantised(some),
            )
        first, other, every = (
            [mean_loss(part[place], number) for number, part in enumerate(parts)]
            for place in _halves(parts[0], half)
        )
        chosen = best_way(ways, other, first)
        table = {way.shown: loss for way, loss in zip(ways, every)}
        console.print(
            "limit: "
            + "  ".join(f"{name} {loss:.4f}" for name, loss in table.items())
            + f"  (loss on calibration samples; chosen: {chosen.shown})"
        )
        halves = {
            way.shown: {"chosen_on": on, "checked_on": against}
            for way, on, against in zip(ways, other, first)
        }
        return chosen, {
            "limit": chosen.shown,
            "calibration_loss": table,
            "halves": halves,
            **self._runs_on(chosen),
        }

    def _runs_on(self, way: Way) -> dict[str, Any]:
        """The entry for `Rounding.runs_on`, if the adapter runs on dequantised weights."""
        if not way.dequantised:
            return {}
        assert isinstance(self.frozen, RoundedBase)
        console.print(
            f"correct: the adapter stays as it is and runs on the dequantised weights of {self.base.name}, "
            f"which emloc merge writes with it"
        )
        return {DEQUANTISED: self.frozen.rounding.as_json()}

    def _dequantised(self, ways: Sequence[Way]) -> OtherWeights | None:
        """The way among `ways` that runs on dequantised weights, if one does."""
        for place, way in enumerate(ways):
            if way.dequantised:
                assert isinstance(self.frozen, RoundedBase)
                return OtherWeights(place, list(self.frozen.layers), self.frozen.parameter)
        return None

    def _candidates_of(
        self, layers: Mapping[str, LoraLayer], ways: Sequence[Way], name: str
    ) -> CandidateLora:
        return self._candidates(layers[name], ways)

    def _candidates(self, layer: LoraLayer, ways: Sequence[Way]) -> CandidateLora:
        original = self.adapter.matrix(layer.up_key)
        mismatches: dict[bool, Mismatch | None] = {}
        ups: list[Tensor] = []
        for way in ways:
            corrected = None
            if way.corrects:
                corrected = self._corrected_up(mismatches, layer, way)
            ups.append(original if corrected is None else corrected.up.to(original.dtype).cpu())
        gains = None
        if layer.magnitude_key is not None:
            gains = [
                self._magnitude(layer, up, way)
                / self._sum(layer, up, self._beside(layer, way)).norm(dim=1)
                for up, way in zip(ups, ways)
            ]
        return CandidateLora(self.adapter.read(layer.down_key), ups, layer.scaling, gains)

    def _sum(self, layer: LoraLayer, up: Tensor, weight: Tensor | None = None) -> Tensor:
        """`W + s·B·A` in float32 or better; `weight` stands in for the base's."""
        weight = self.weights[layer.name].layer_weight(self.base.read) if weight is None else weight
        high = moment_dtype(weight.dtype)
        down = self.adapter.matrix(layer.down_key).to(high)
        return torch.addmm(weight.to(high), up.to(high), down, alpha=layer.scaling)

    def _beside(self, layer: LoraLayer, way: Way) -> Tensor | None:
        """The weight that a layer's LoRA is added to, where it is not the base's own."""
        if not way.dequantised or layer.name not in self.frozen.layers:
            return None
        dtype = self.base.tensors[self.weights[layer.name].names[0]].dtype
        return self.frozen.operator(layer.name).dense(moment_dtype(dtype))

    def _magnitude(self, layer: LoraLayer, up: Tensor, way: Way) -> Tensor:
        """DoRA's magnitude for the base beside B = `up`; without correction, the adapter's own."""
        assert layer.magnitude_key is not None
        magnitude = self.adapter.magnitude(layer.magnitude_key)
        if layer.name not in self.frozen.layers or not way.corrects:
            return magnitude
        high = moment_dtype(self.base.tensors[self.weights[layer.name].names[0]].dtype)
        original = self.adapter.matrix(layer.up_key)
        emulated = self._sum(layer, original, self.frozen.operator(layer.name).dense(high))
        return dora_magnitude(magnitude, self._sum(layer, up), emulated)

    def write(self, work: Path, way: Way) -> dict[str, dict[str, Any]]:
        """Write the adapter corrected that way; returns what happened to each layer."""
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
                if layer is None or way.dequantised or layer.name not in self.frozen.layers:
                    shard.write(key, self.adapter.read(key))
                    continue
                if last is None or last[0] != layer.name:
                    up, reports[layer.name] = self._corrected(layer, way)
                    last = (layer.name, up)
                    advance(note=layer.name)
                up = last[1]
                changed = up if key == layer.up_key else self._magnitude(layer, up, way)
                shard.write(key, changed.reshape(infos[key].shape))
        config = {
            **self.adapter.config,
            "base_model_name_or_path": self.base.reference_name(),
            # The emulator's layers are linear; the base's may store their weights transposed.
            "fan_in_fan_out": any(weight.transposed for weight in self.weights.values()),
        }
        write_json(work / CONFIG_NAME, config)
        return dict(sorted(reports.items()))

    def _corrected(self, layer: LoraLayer, way: Way) -> tuple[Tensor, dict[str, Any]]:
        """B as it will be stored, and what happened to it."""
        mismatches: dict[bool, Mismatch | None] = {}
        corrected = self._corrected_up(mismatches, layer, way)
        mismatch = mismatches[way.by_data]
        assert corrected is not None
        assert mismatch is not None
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


def _halves(losses: Sequence[LossSum], half: int) -> tuple[slice, slice, slice]:
    """The first micro-batches, the others and all; where one half has no labels, all serve for both."""
    first, other, every = slice(half), slice(half, None), slice(None)
    terms = [sum(loss.terms for loss in losses[part]) for part in (first, other)]
    return (first, other, every) if all(terms) else (every, every, every)
