"""Stage 1: stream a model once, and write its emulator block by block."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from emloc.artefacts.digest import batches_digest
from emloc.artefacts.kinds import BASE, EMULATOR
from emloc.artefacts.manifest import ModelReference
from emloc.artefacts.output_place import has_place
from emloc.compression.block_runs import runs_in
from emloc.compression.choice import choose_streamed, streamed_itemsize
from emloc.compression.emulator_folder import EmulatorFolder
from emloc.compression.fitting import compress_blocks
from emloc.compression.groups import CompressionPlan
from emloc.compression.menu_choice import price_menus, prices_in, with_chosen
from emloc.compression.output_gradients import OutputGradients, gradients_in
from emloc.compression.truncation import allocate_sizes
from emloc.config import CompressConfig
from emloc.errors import CheckpointError, ConfigError
from emloc.extend.capabilities import token_count
from emloc.extend.data_capabilities import calibration_tokens_of
from emloc.extend.family import Batch, ModelFamily
from emloc.extend.formats import format_named
from emloc.extend.opening import named_family, open_model
from emloc.extend.plugin_options import of_family, own_options
from emloc.formats.abilities import Prepares, WeighsRows
from emloc.formats.layer_format import keep_ratio_of
from emloc.formats.trellis import TRELLIS
from emloc.machine.progress import console
from emloc.options.compress import AUTO, with_size
from emloc.planning.contract import compress_contract
from emloc.planning.setting import Setting
from emloc.stages.frame import Artefact, Written
from emloc.stages.registry import planned_stages
from emloc.stages.stage import stage
from emloc.streaming.stream import UnitStream

PATHS = {"output_dir", "model_name_or_path", "single_file_config", "dataset"}
"""Options whose meaning is in a digest instead."""

NO_TOKEN = "no calibration token reached it"


@stage(
    CompressConfig,
    check=has_place,
    consumes={"model_name_or_path": BASE},
    produces=EMULATOR,
    folder="emulator",
    memory=Setting.compress,
)
def compress(config: CompressConfig) -> Path:
    """Compress a model into an emulator; returns its folder."""
    base, family = open_model(config.model_name_or_path, config.single_file_config, config.family)
    config = of_family(config, family)
    if "quantization_config" in base.config:
        raise CheckpointError(
            f"{base.name} is already quantised or an emulator; compress the full-precision original."
        )
    format = TRELLIS if config.format == AUTO else format_named(config.format)
    if isinstance(format, Prepares):
        format.prepare(torch.device(config.device))
    contract = None
    if config.memory is not None:
        config, contract = compress_contract(config, base, family, planned_stages())
    batches = family.calibration_batches(base, config)
    settings = {
        **own_options(with_size(config), PATHS),
        **named_family(base, family),
        "base_digest": base.digest(),
        "companions_digest": base.companions_digest(),
        "data_digest": batches_digest(batches),
    }
    artefact = Artefact(
        "compress",
        EMULATOR,
        config.output_dir,
        settings,
        family.name,
        ModelReference.of(base, settings["base_digest"]),
        packages=("torch", "transformers", "safetensors", "numpy"),
        device=config.device,
        memory=config.memory,
    )

    def write(work: Path) -> Written:
        stream = UnitStream(family, base, config.device)
        plan = choose_streamed(stream, config)
        _say_dense(plan.kept_dense)
        _say_tokens(family, batches, plan, config)
        errors, minded = None, _minded(stream, plan, batches, config, work)
        if any(group.menu for group in plan.groups):
            plan, errors = _chosen(stream, plan, batches, config, work, minded)
        folder = EmulatorFolder(stream, plan, config.dtype, work)
        compress_blocks(stream, folder, batches, config.propagate_errors, minded)
        if config.keep_ratio_allocation == "error":
            errors = allocate_sizes(folder)
        return _written(folder, config, batches, errors)

    return artefact.write(write, lambda: contract)


def _chosen(
    stream: UnitStream,
    plan: CompressionPlan,
    batches: Sequence[Batch],
    config: CompressConfig,
    work: Path,
    minded: OutputGradients | None,
) -> tuple[CompressionPlan, dict[str, float]]:
    """The plan of `format=auto` once every layer's form is chosen, and what is predicted of it."""
    itemsize_of = streamed_itemsize(stream, config.dtype)
    itemsizes = {group.owner: itemsize_of(group.owner) for group in plan.groups}
    shares = {name: keep_ratio_of(name, config, size) for name, size in itemsizes.items()}
    menus = price_menus(stream, plan, batches, itemsizes, work, minded)
    return with_chosen(plan, menus, shares, of_loss=minded is not None)


def _minded(
    stream: UnitStream,
    plan: CompressionPlan,
    batches: Sequence[Batch],
    config: CompressConfig,
    work: Path,
) -> OutputGradients | None:
    """Gradients that errors of outputs are weighed by, if they are.

    Raises:
        ConfigError: a layer's format does not heed it.
    """
    if config.weigh_errors == "alike":
        return None
    for group in plan.groups:
        if group.menu:  # their forms are chosen by it
            continue
        if not isinstance(group.form.format, WeighsRows) or config.propagate_errors:
            what = (
                "propagate_errors"
                if config.propagate_errors
                else f"format {group.form.format.name}"
            )
            raise ConfigError(
                f"weigh_errors=gradients: {what} does not weigh a layer's outputs by them; leave it out, or "
                f"pass format=auto, low_rank or one with factors."
            )
    return OutputGradients.gather(stream, plan, batches, work)


def _tokens(family: ModelFamily, batches: Sequence[Batch]) -> int:
    return sum(token_count(family, batch) for batch in batches)


def _samples(batches: Sequence[Batch]) -> int:
    return sum(next(iter(batch.values())).shape[0] for batch in batches)


def _say_tokens(
    family: ModelFamily, batches: Sequence[Batch], plan: CompressionPlan, config: CompressConfig
) -> None:
    """Fewer tokens than a layer has inputs leave directions of which nothing is known."""
    tokens, widest = _tokens(family, batches), max(group.shape.d_in for group in plan.groups)
    samples, wanted = _samples(batches), config.num_calibration_samples
    if samples < wanted and calibration_tokens_of(family, config) is None:
        console.print(
            f"compress: the data set has {samples} samples, not num_calibration_samples={wanted}"
        )
    hint = " (few: more samples would describe it better)" if tokens < widest else ""
    console.print(f"compress: {tokens} calibration tokens, layers of up to {widest} inputs{hint}")


def _say_dense(kept: Mapping[str, str]) -> None:
    for reason in sorted(set(kept.values())):
        names = [name for name, why in kept.items() if why == reason]
        more = ", …" if len(names) > 1 else ""
        console.print(f"{len(names)} weights stay dense ({reason}): {names[0]}{more}")


def _written(
    folder: EmulatorFolder,
    config: CompressConfig,
    batches: Sequence[Batch],
    errors: Mapping[str, Any] | None,
) -> Written:
    reports, digests, written = folder.finish()
    base, family = folder.base, folder.stream.family
    unreached = [name for report in reports for name in report["unreached"]]
    _say_dense(dict.fromkeys(unreached, NO_TOKEN))
    if not any(report["layers"] for report in reports):
        raise ConfigError(f"No layer of {base.name} can be compressed: {NO_TOKEN}.")
    return Written(
        digests,
        layers={name: entry for report in reports for name, entry in report["layers"].items()},
        tables=[table.as_json() for table in folder.plan.tables] or None,
        kept_dense={**folder.plan.kept_dense, **dict.fromkeys(unreached, NO_TOKEN)},
        summary={
            "base_bytes": sum(info.nbytes for info in base.tensors.values()),
            "emulator_bytes": sum(info.nbytes for info in written.tensors.values()),
            "calibration_samples": _samples(batches),
            "calibration_tokens": _tokens(family, batches),
            "widest_input": max(group.shape.d_in for group in folder.plan.groups),
            "emulator_digest": written.digest(),
            **({"predicted_error": errors} if errors else {}),
            **({"drawn": list(base.drawn)} if base.drawn else {}),
        },
        measured={
            "block_seconds": [report["seconds"] for report in reports],
            "device": config.device,
        },
        leftovers=[
            *folder.reports,
            *prices_in(folder.work),
            *gradients_in(folder.work),
            *runs_in(folder.work),
        ],
    )
