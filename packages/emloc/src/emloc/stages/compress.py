"""Stage 1: stream a model once, and write its low-rank emulator block by block."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emloc.artefacts.digest import batches_digest
from emloc.artefacts.manifest import Manifest, ModelReference, is_complete, versions
from emloc.artefacts.output_place import has_place
from emloc.artefacts.stage_folder import stage_folder
from emloc.compression.emulator_folder import EmulatorFolder
from emloc.compression.groups import Plan, make_plan, refuse_idle_patterns
from emloc.compression.one_pass import compress_blocks
from emloc.compression.rank import match_pattern
from emloc.compression.truncation import allocate_ranks
from emloc.config import CompressConfig
from emloc.errors import CheckpointError, ConfigError
from emloc.extend.family import Batch, ModelFamily
from emloc.extend.plugin_options import of_family, own_options
from emloc.extend.plugins import open_model
from emloc.machine.memory import PeakMemory, return_large_blocks
from emloc.machine.progress import console
from emloc.planning.contract import compress_contract, keeping
from emloc.stages.stage import stage
from emloc.streaming.stream import UnitStream

PATHS = {"output_dir", "model_name_or_path", "single_file_config", "dataset"}
"""Options whose meaning is in a digest instead."""

NO_TOKEN = "no calibration token reached it"


@stage(CompressConfig, check=has_place)
def compress(config: CompressConfig) -> Path:
    """Compress a model into an emulator; returns its folder."""
    base, family = open_model(config.model_name_or_path, config.single_file_config)
    config = of_family(config, family)
    if "quantization_config" in base.config:
        raise CheckpointError(
            f"{base.name} is quantised or an emulator already; compress the full-precision original."
        )
    contract = None
    if config.memory is not None:
        config, contract = compress_contract(config, base, family)
    batches = family.calibration_batches(base, config)
    settings = {
        **own_options(config, PATHS),
        "base_digest": base.digest(),
        "companions_digest": base.companions_digest(),
        "data_digest": batches_digest(batches),
    }
    if is_complete("compress", "emulator", config.output_dir, settings):
        return config.output_dir
    started = time.monotonic()
    return_large_blocks()
    with keeping(contract), stage_folder(config.output_dir, settings) as work:
        with PeakMemory(config.device, limit=config.memory) as peak:
            stream = UnitStream(family, base, config.device)
            plan = _plan(stream, config)
            _say_tokens(family, batches, plan, config)
            folder = EmulatorFolder(stream, plan, config.dtype, work)
            compress_blocks(stream, folder, batches)
            errors = allocate_ranks(folder) if config.keep_ratio_allocation == "error" else None
            manifest = _manifest(folder, settings, batches)
        if errors:
            manifest.summary["predicted_error"] = errors
        manifest.measured.update(
            seconds=round(time.monotonic() - started, 3), device=config.device, **peak.figures()
        )
        if contract is not None:
            contract.report(manifest.measured)
        manifest.write(work)
        folder.forget_reports()
    return config.output_dir


def _plan(stream: UnitStream, config: CompressConfig) -> Plan:
    """Ranks of all layers; says which stay dense, and refuses if all do."""
    kept = dict(stream.family.kept_dense(stream.model))
    included = [[name] for name in _included(stream, kept, config)]
    groups = [*stream.family.layer_groups(stream.model), *included]
    plan = make_plan(groups, stream.layer_shape, config)
    chosen = {name for [name] in included}
    plan.kept_dense.update({name: why for name, why in kept.items() if name not in chosen})
    plan.kept_dense.update(_other_weights(stream, plan))
    reasons = sorted(set(plan.kept_dense.values()))
    if not plan.groups:
        why = "; ".join(reasons) or "it has no linear layers in blocks"
        raise ConfigError(f"No layer of {stream.checkpoint.name} can be compressed: {why}.")
    _say_dense(plan.kept_dense)
    return plan


def _included(stream: UnitStream, kept: Mapping[str, str], config: CompressConfig) -> Sequence[str]:
    """Layers that the family keeps dense and the options want compressed."""
    refuse_idle_patterns(list(kept), config, ("include",))
    wanted = dict.fromkeys(config.include, True)
    names = [name for name in kept if match_pattern(wanted, name)]
    for name in names:
        if not any(name.startswith(f"{block}.") for block in stream.blocks):
            raise ConfigError(
                f"include: {name} lies in no block of {stream.checkpoint.name} ({kept[name]}), so it "
                f"stays dense; leave it out."
            )
    return names


def _tokens(family: ModelFamily, batches: Sequence[Batch]) -> int:
    def count(batch: Batch) -> int:
        mask = family.token_mask(batch)
        return next(iter(batch.values())).numel() if mask is None else int(mask.sum())

    return sum(count(batch) for batch in batches)


def _samples(batches: Sequence[Batch]) -> int:
    return sum(next(iter(batch.values())).shape[0] for batch in batches)


def _say_tokens(
    family: ModelFamily, batches: Sequence[Batch], plan: Plan, config: CompressConfig
) -> None:
    """Fewer tokens than a layer has inputs leave directions of which nothing is known."""
    tokens, widest = _tokens(family, batches), max(group.d_in for group in plan.groups)
    samples, wanted = _samples(batches), config.num_calibration_samples
    if samples < wanted and config.num_calibration_tokens is None:
        console.print(
            f"compress: the data have {samples} samples, not num_calibration_samples={wanted}"
        )
    hint = " (few: more samples would describe it better)" if tokens < widest else ""
    console.print(f"compress: {tokens} calibration tokens, layers of up to {widest} inputs{hint}")


def _other_weights(stream: UnitStream, plan: Plan) -> dict[str, str]:
    """Large weights of blocks that belong to no linear layer, such as experts fused in one tensor."""
    layers = {name for group in plan.groups for name in group.layers} | plan.kept_dense.keys()
    return {
        name: "no linear layer"
        for block in stream.blocks
        for name, parameter in stream.model.get_submodule(block).named_parameters(prefix=block)
        if parameter.ndim >= 3 and name.rpartition(".")[0] not in layers
    }


def _say_dense(kept: Mapping[str, str]) -> None:
    for reason in sorted(set(kept.values())):
        names = [name for name, found in kept.items() if found == reason]
        more = ", …" if len(names) > 1 else ""
        console.print(f"{len(names)} weights stay dense ({reason}): {names[0]}{more}")


def _manifest(
    folder: EmulatorFolder, settings: dict[str, Any], batches: Sequence[Batch]
) -> Manifest:
    reports, digests, written = folder.finish()
    base, family = folder.base, folder.stream.family
    unreached = [name for report in reports for name in report["unreached"]]
    kept_dense = {**folder.plan.kept_dense, **dict.fromkeys(unreached, NO_TOKEN)}
    _say_dense(dict.fromkeys(unreached, NO_TOKEN))
    if not any(report["layers"] for report in reports):
        raise ConfigError(f"No layer of {base.name} can be compressed: {NO_TOKEN}.")
    return Manifest(
        kind="emulator",
        family=family.name,
        base_model=ModelReference.of(base, settings["base_digest"]),
        settings=settings,
        layers={name: entry for report in reports for name, entry in report["layers"].items()},
        kept_dense=kept_dense,
        summary={
            "base_bytes": sum(info.nbytes for info in base.tensors.values()),
            "emulator_bytes": sum(info.nbytes for info in written.tensors.values()),
            "calibration_samples": _samples(batches),
            "calibration_tokens": _tokens(family, batches),
            "widest_input": max(group.d_in for group in folder.plan.groups),
            "emulator_digest": written.digest(),
        },
        files=digests,
        versions=versions("emloc", "torch", "transformers", "safetensors", "numpy"),
        measured={"block_seconds": [report["seconds"] for report in reports]},
    )
