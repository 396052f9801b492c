"""Stage 1: stream a model once, and write its low-rank emulator block by block."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emloc.checkpoint import Checkpoint
from emloc.compression import compress_blocks
from emloc.config import CompressConfig
from emloc.digest import batches_digest
from emloc.emulator import EmulatorFolder
from emloc.errors import CheckpointError, ConfigError
from emloc.family import Batch
from emloc.manifest import Manifest, ModelReference, same_settings, versions
from emloc.memory import PeakMemory, return_large_blocks
from emloc.output import stage_folder
from emloc.plan import Plan, make_plan
from emloc.plugins import family_of
from emloc.progress import console
from emloc.stage import stage
from emloc.stream import UnitStream


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
        "companions_digest": base.companions_digest(),
        "data_digest": batches_digest(batches),
    }
    if same_settings(Manifest.find(config.output_dir), settings):
        console.print(f"compress: {config.output_dir} is complete already")
        return config.output_dir
    started = time.monotonic()
    return_large_blocks()
    with stage_folder(config.output_dir, settings) as work:
        with PeakMemory(config.device) as peak:
            stream = UnitStream(family, base, config.device)
            plan = _plan(stream, config)
            folder = EmulatorFolder(stream, plan, config.dtype, work)
            compress_blocks(stream, folder, batches)
            manifest = _manifest(folder, settings, batches)
        manifest.measured.update(seconds=round(time.monotonic() - started, 3), **peak.figures())
        manifest.write(work)
        folder.forget_reports()
    return config.output_dir


def _plan(stream: UnitStream, config: CompressConfig) -> Plan:
    """Ranks of all layers; says which stay dense, and refuses if all do."""
    plan = make_plan(stream.model, stream.family.layer_groups(stream.model), config)
    reasons = sorted(set(plan.kept_dense.values()))
    if not plan.groups:
        why = "; ".join(reasons) or "it has no linear layers in blocks"
        raise ConfigError(f"No layer of {stream.checkpoint.name} can be compressed: {why}.")
    for reason in reasons:
        names = [name for name, found in plan.kept_dense.items() if found == reason]
        console.print(f"{len(names)} layers stay dense ({reason}): {names[0]}, …")
    return plan


def _manifest(
    folder: EmulatorFolder, settings: dict[str, Any], batches: Sequence[Batch]
) -> Manifest:
    reports, written = folder.finish()
    base, family = folder.base, folder.stream.family
    return Manifest(
        kind="emulator",
        family=family.name,
        base_model=ModelReference(
            name_or_path=base.reference_name(), digest=settings["base_digest"]
        ),
        settings=settings,
        layers={name: entry for report in reports for name, entry in report["layers"].items()},
        kept_dense=folder.plan.kept_dense,
        summary={
            "base_bytes": sum(info.nbytes for info in base.tensors.values()),
            "emulator_bytes": sum(info.nbytes for info in written.tensors.values()),
            "calibration_samples": sum(next(iter(b.values())).shape[0] for b in batches),
            "calibration_tokens": sum(int(family.token_mask(b).sum()) for b in batches),
            "emulator_digest": written.digest(),
        },
        files=folder.digests(),
        versions=versions("emloc", "torch", "transformers", "safetensors", "numpy"),
        measured={"block_seconds": [report["seconds"] for report in reports]},
    )
