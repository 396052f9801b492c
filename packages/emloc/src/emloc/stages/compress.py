"""Stage 1: stream a model once, and write its low-rank emulator block by block.

All calibration micro-batches run through the base model in lockstep. At each block its weights are
loaded, hooks fold the moments of every group's side, and when all micro-batches are through, each
group is factorised and the block's shard is written and forgotten. Peak memory is one block in
float32, its moments and one eigenproblem, and the micro-batches' hidden states.

A block whose shard is complete is only run, not factorised again: an interrupted run gives the same
bytes as an uninterrupted one.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emloc.checkpoint import INDEX_NAME, Checkpoint
from emloc.config import CompressConfig
from emloc.digest import batches_digest
from emloc.errors import CheckpointError, ConfigError
from emloc.family import Batch, EmulatorLayers, ModelFamily
from emloc.gram import Moments, smaller_side
from emloc.lockstep import Call, current_call, lockstep
from emloc.lowrank import factorise, relative_error
from emloc.manifest import Manifest, ModelReference, same_settings, versions
from emloc.memory import PeakMemory, return_large_blocks
from emloc.output import ShardWriter, copy_file, file_sha256, stage_folder, write_json
from emloc.plan import Group, Plan, make_plan
from emloc.plugins import family_of
from emloc.progress import console, progress_bar
from emloc.stage import stage
from emloc.stream import UnitStream

Declared = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@stage(CompressConfig)
def compress(config: CompressConfig) -> Path:
    """Compress a model into an emulator; returns its folder."""
    base = Checkpoint.open(config.model_name_or_path)
    if "quantization_config" in base.config:
        raise CheckpointError(
            f"{base.name} is quantised or an emulator already; compress the full-precision original."
        )
    family = family_of(base)
    batches = family.calibration_batches(base, config)
    settings = {
        **config.model_dump(mode="json", exclude={"output_dir", "model_name_or_path", "dataset"}),
        "base_digest": base.digest(),
        "data_digest": batches_digest(batches),
    }
    if same_settings(Manifest.find(config.output_dir), settings):
        console.print(f"compress: {config.output_dir} is complete already")
        return config.output_dir
    started = time.monotonic()
    return_large_blocks()
    with stage_folder(config.output_dir, settings) as work:
        with PeakMemory(config.device) as peak:
            writer = _EmulatorWriter(family, base, config, work)
            writer.run(batches)
            manifest = writer.finish(settings, batches)
        manifest.measured.update(seconds=round(time.monotonic() - started, 3), **peak.figures())
        manifest.write(work)
        writer.forget_reports()
    return config.output_dir


@dataclass
class _EmulatorWriter:
    family: ModelFamily
    base: Checkpoint
    config: CompressConfig
    work: Path

    def __post_init__(self) -> None:
        self.stream = UnitStream(self.family, self.base, self.config.device)
        model = self.stream.model
        self.plan: Plan = make_plan(model, self.family.layer_groups(model), self.config)
        if not self.plan.groups:
            reasons = sorted(set(self.plan.kept_dense.values())) or ["it has no linear layers"]
            raise ConfigError(
                f"No layer of {self.base.name} can be compressed: {'; '.join(reasons)}."
            )
        self.shards = len(self.stream.blocks) + 1
        for reason in sorted(set(self.plan.kept_dense.values())):
            names = [name for name, why in self.plan.kept_dense.items() if why == reason]
            console.print(f"{len(names)} layers stay dense ({reason}): {names[0]}, …")

    # -- names ------------------------------------------------------------------------------

    def _stored(self, parameter: str) -> str:
        name = self.family.tensor_name(self.stream.model, parameter, self.base)
        assert name is not None, parameter
        return name

    def _shard(self, index: int) -> str:
        return f"model-{index:05d}-of-{self.shards:05d}.safetensors"

    def _report(self, index: int) -> Path:
        return self.work / f"block-{index:05d}.json"

    def _dtype(self, stored: torch.dtype) -> torch.dtype:
        wanted = self.config.dtype
        return (
            stored if wanted == "auto" or not stored.is_floating_point else getattr(torch, wanted)
        )

    def _block_tensors(self, block: str) -> list[str]:
        module = self.stream.model.get_submodule(block)
        names = {self._stored(f"{block}.{path}") for path, _ in module.named_parameters()}
        return sorted(names | {n for n in self.base.tensors if n.startswith(f"{block}.")})

    # -- the pass ---------------------------------------------------------------------------

    def run(self, batches: Sequence[Batch]) -> None:
        blocks = self.stream.blocks
        done = {block for i, block in enumerate(blocks) if self._report(i + 1).is_file()}
        device = self.stream.device
        calls = [self._call({k: v.to(device) for k, v in batch.items()}) for batch in batches]
        with progress_bar("compress", len(blocks)) as advance:

            @contextmanager
            def visit(unit: str) -> Iterator[None]:
                with self.stream.filled(unit):
                    if unit not in blocks or unit in done:
                        yield
                    else:
                        yield from self._compress_block(blocks.index(unit) + 1, unit)
                if unit in blocks:
                    advance(note=unit)

            lockstep(self.stream.model, self.stream.units, calls, visit, stop_after=blocks[-1])

    def _call(self, batch: Batch) -> Call:
        mask = self.family.token_mask(batch).reshape(-1)
        # A mask of all ones would only cost a copy of every activation.
        return Call(
            lambda: self.family.forward_loss(self.stream.model, batch),
            context=None if bool(mask.all()) else mask,
        )

    def _compress_block(self, index: int, block: str) -> Iterator[None]:
        """Fold moments while the caller runs the micro-batches, then factorise and write."""
        started = time.monotonic()
        groups = self.plan.within(block)
        moments: dict[str, Moments] = {}
        handles = [
            self.stream.model.get_submodule(group.owner).register_forward_hook(
                self._folding(group, moments)
            )
            for group in groups
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        tensors: dict[str, Tensor] = {}
        reports: dict[str, Any] = {}
        for group in groups:
            reports[group.owner] = self._factorise(group, moments.pop(group.owner, None), tensors)
        replaced = {self._stored(f"{name}.weight") for group in groups for name in group.layers}
        for name in self._block_tensors(block):
            if name not in replaced:
                stored = self.base.read(name)
                tensors[name] = stored.to(self._dtype(stored.dtype))
        self._write(index, tensors)
        report = {"layers": reports, "seconds": round(time.monotonic() - started, 3)}
        write_json(self._report(index), report)

    def _folding(self, group: Group, moments: dict[str, Moments]) -> Any:
        side = smaller_side(sum(group.d_out), group.d_in)
        folded = moments[group.owner] = Moments(side, group.owner)

        def fold(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            call = current_call()
            mask = None if call is None else call.context
            x = inputs[0].reshape(-1, group.d_in)
            padded = mask is not None and mask.shape[0] == x.shape[0]
            if side == "input":
                folded.fold(x[mask] if padded else x)
            elif len(group.layers) == 1:
                y = output.reshape(-1, group.d_out[0])
                bias = dict(module.named_parameters()).get("bias")
                y = y if bias is None else y - bias
                folded.fold(y[mask] if padded else y)
            else:
                folded.fold((x[mask] if padded else x) @ self._stacked(group).T)

        return fold

    def _stacked(self, group: Group) -> Tensor:
        weights = [self.stream.model.get_parameter(f"{name}.weight") for name in group.layers]
        return (
            torch.cat([weight.detach() for weight in weights]) if len(weights) > 1 else weights[0]
        )

    def _factorise(
        self, group: Group, moments: Moments | None, tensors: dict[str, Tensor]
    ) -> dict[str, Any]:
        if moments is None or moments.tokens == 0:
            raise ConfigError(
                f"No calibration token reached layer {group.owner}; use more samples, or exclude it."
            )
        factors = factorise(self._stacked(group).detach(), moments, group.rank)
        dtype = self._dtype(self.base.tensors[self._stored(f"{group.owner}.weight")].dtype)
        tensors[self._factor(group.owner, "right")] = factors.right.to(dtype)
        for name, left in zip(group.layers, factors.left.split(list(group.d_out))):
            tensors[self._factor(name, "left")] = left.to(dtype)
        return {
            "layers": list(group.layers),
            "rank": group.rank,
            "d_out": list(group.d_out),
            "d_in": group.d_in,
            "side": moments.side,
            "tokens": moments.tokens,
            "relative_error": relative_error(factors.spectrum, group.rank),
        }

    def _factor(self, layer: str, kind: str) -> str:
        return self._stored(f"{layer}.weight").removesuffix("weight") + kind

    def _write(self, index: int, tensors: dict[str, Tensor]) -> None:
        declared: Declared = {n: (t.dtype, tuple(t.shape)) for n, t in sorted(tensors.items())}
        with ShardWriter(self.work / self._shard(index), declared) as shard:
            for name in declared:
                shard.write(name, tensors[name])

    # -- the folder -------------------------------------------------------------------------

    def finish(self, settings: dict[str, Any], batches: Sequence[Batch]) -> Manifest:
        """Write what is not in a block, the index, config, tokenizer files and the manifest."""
        self._write_rest()
        reports = [
            json.loads(self._report(i + 1).read_text("utf-8"))
            for i in range(len(self.stream.blocks))
        ]
        weight_map: dict[str, str] = {}
        total = 0
        written = Checkpoint.from_files(
            str(self.work), self.work, {}, {self._shard(i + 1): None for i in range(self.shards)}
        )
        for name, info in written.tensors.items():
            weight_map[name] = info.file
            total += info.nbytes
        write_json(
            self.work / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
        groups = [(group.layers, group.rank) for group in self.plan.groups]
        emulator_config = self.family.emulator_config(self.base, EmulatorLayers(groups))
        write_json(self.work / "config.json", emulator_config)
        for name in self.base.companions():
            copy_file(self.base.path / name, self.work / name)
        base_bytes = sum(info.nbytes for info in self.base.tensors.values())
        first = next(iter(batches))
        return Manifest(
            kind="emulator",
            family=self.family.name,
            base_model=ModelReference(
                name_or_path=self.base.reference_name(), digest=settings["base_digest"]
            ),
            settings=settings,
            layers={name: entry for report in reports for name, entry in report["layers"].items()},
            kept_dense=self.plan.kept_dense,
            summary={
                "base_bytes": base_bytes,
                "emulator_bytes": total,
                "calibration_samples": sum(next(iter(b.values())).shape[0] for b in batches),
                "calibration_tokens": sum(int(self.family.token_mask(b).sum()) for b in batches),
                "inputs": sorted(first),
                "emulator_digest": written.digest(),
            },
            files={
                self._shard(i + 1): file_sha256(self.work / self._shard(i + 1))
                for i in range(self.shards)
            },
            versions=versions("emloc", "torch", "transformers", "safetensors", "numpy"),
            measured={"block_seconds": [report["seconds"] for report in reports]},
        )

    def forget_reports(self) -> None:
        """Drop what only a continuation needs; the manifest holds it now."""
        for i in range(len(self.stream.blocks)):
            self._report(i + 1).unlink()

    def _write_rest(self) -> None:
        inside = {name for block in self.stream.blocks for name in self._block_tensors(block)}
        rest = [name for name in self.base.tensors if name not in inside]
        declared: Declared = {
            name: (self._dtype(self.base.tensors[name].dtype), self.base.tensors[name].shape)
            for name in rest
        }
        with ShardWriter(self.work / self._shard(self.shards), declared) as shard:
            for name, (dtype, _) in declared.items():
                shard.write(name, self.base.read(name).to(dtype))
