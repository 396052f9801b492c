"""Stage 3: fit a LoRA trained on an emulator to the original model, one layer at a time.

Reads a layer's weight from the base's shards and its stored form from the emulator's, never a model.
With `limit="auto"` one streamed pass over the base compares ways to correct on calibration samples; a fit to
the data (`strength`) needs one to see what the LoRA reads.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from emloc.adapters.adapted_weights import adapted_weights, part_weights
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import folder_named
from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.digest import batches_digest
from emloc.artefacts.kinds import ADAPTER, CORRECTED_ADAPTER, EMULATOR
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.artefacts.output_place import has_place
from emloc.artefacts.small_files import copy_file, write_json
from emloc.compression.groups import dense_shapes, written_groups
from emloc.config import CorrectConfig
from emloc.correction.adapter_correction import AdapterCorrection
from emloc.correction.reads import Reads
from emloc.errors import ConfigError, MismatchError
from emloc.extend.capabilities import exported
from emloc.extend.family import Batch, ModelFamily
from emloc.extend.opening import named_family, open_model
from emloc.extend.plugin_options import of_family, own_options
from emloc.planning.setting import Setting
from emloc.stages.frame import Artefact, Written, digests
from emloc.stages.stage import stage
from emloc.streaming.stream import UnitStream

READS = "reads"
"""The folder inside the unfinished adapter's in which sums over the data wait."""

PATHS = {
    "adapter",
    "emulator",
    "output_dir",
    "model_name_or_path",
    "single_file_config",
    "dataset",
}
"""Options whose meaning is in a digest instead."""


def _can_correct(config: CorrectConfig) -> None:
    if config.strength is not None and "limit" in config.model_fields_set:
        raise ConfigError(
            "correct: limit and strength are two ways to correct; pass one of them, or neither to compare "
            "both on data."
        )
    if config.dataset is None and config.strength is not None:
        raise ConfigError("correct: strength is of a fit to data; pass a dataset.")
    if config.dataset is None and config.limit == "auto":
        raise ConfigError(
            "correct: limit=auto compares limits on data; pass a dataset, or a fixed limit such as 1."
        )
    has_place(config)


def _compares(config: CorrectConfig) -> bool:
    return config.limit == "auto" and config.strength is None


@stage(
    CorrectConfig,
    check=_can_correct,
    consumes={"emulator": EMULATOR, "adapter": ADAPTER},
    produces=CORRECTED_ADAPTER,
    folder="corrected",
    memory=Setting.correct,
)
def correct(config: CorrectConfig) -> Path:
    """Correct an adapter for the original model; returns the new adapter's folder."""
    emulator_manifest = _emulator_manifest(config.emulator)
    adapter = Adapter.open(config.adapter)
    _refuse_foreign_adapter(adapter, config.emulator, emulator_manifest)
    origin = emulator_manifest.base_model
    base, family = open_model(
        config.model_name_or_path or origin.name_or_path,
        config.single_file_config or origin.single_file_config,
        config.family,
        emulator_manifest.family,
    )
    config = of_family(config, family)
    if base.digest() != origin.digest:
        raise MismatchError(
            f"Emulator {config.emulator} was built from another model than {base.name} (it names "
            f"{origin.name_or_path}); pass that one."
        )
    adapter = adapter.with_parts(base.parts)
    emulator = Checkpoint.open(config.emulator)
    _refuse_foreign_parts(adapter, emulator, base)
    skeleton = family.skeleton(base, torch.float32)
    adapted = adapted_weights(adapter, family, skeleton, base)
    names = _weight_names(emulator_manifest, family, skeleton, base)
    groups = written_groups(
        emulator_manifest.layers, dense_shapes(emulator_manifest.layers, skeleton)
    )
    del skeleton
    adapter = adapted.adapter
    contract = correct.contract(config, base, family, adapter)
    batches = _batches(config, family, base)
    settings = {
        **own_options(config, PATHS),
        **named_family(base, family),
        "base_digest": origin.digest,
        "emulator_digest": emulator_manifest.summary["emulator_digest"],
        "adapter_digest": adapter.digest(),
        "data_digest": batches_digest(batches),
    }
    artefact = Artefact(
        "correct",
        CORRECTED_ADAPTER,
        config.output_dir,
        settings,
        family.name,
        ModelReference.of(base, origin.digest),
        emulator=ModelReference(
            name_or_path=str(Path(config.emulator).absolute()),
            digest=emulator_manifest.summary["emulator_digest"],
        ),
        packages=("torch", "safetensors"),
        device=config.device,
        memory=config.memory,
    )

    def write(work: Path) -> Written:
        reads = Reads(work / READS, frozenset(n for group in groups for n in group.layers))
        correction = AdapterCorrection(config, base, emulator, groups, adapted, names, reads)
        stream = None
        if (
            batches
        ):  # names are all that is needed else, and a skeleton grows with the model's depth
            saved = {name: adapter.read(key) for name, key in adapter.saved.items()}
            stream = UnitStream(family, base, config.device, instead=saved)
        if stream is not None and _compares(config):
            at_once = None if contract is None else contract.setting.candidates
            chosen, summary = correction.choose(stream, batches, at_once)
        else:
            chosen, summary = correction.given(stream, batches)
        del stream
        layers = correction.write(work, chosen)
        shutil.rmtree(work / READS, ignore_errors=True)
        for name, part in adapter.parts.items():
            _carry_over(part, base, work / name)
        others = exported(family, base, work)
        return Written(
            digests(work, (*adapter.files, *others)),
            layers,
            summary=summary,
            measured={"device": config.device},
        )

    return artefact.write(write, lambda: contract)


def _weight_names(
    manifest: Manifest, family: ModelFamily, skeleton: nn.Module, base: Checkpoint
) -> dict[str, str]:
    """Tensor names of the weights that the emulator has in another form, by layer."""
    names: dict[str, str] = {}
    for layer in (name for entry in manifest.layers.values() for name in entry["layers"]):
        stored = family.stored(skeleton, f"{layer}.weight", base)
        if stored is not None and stored.plain_name is not None:
            names[layer] = stored.plain_name
    return names


def _refuse_foreign_parts(adapter: Adapter, emulator: Checkpoint, base: Checkpoint) -> None:
    """A part is not compressed, so what it was trained beside must be the base's own."""
    for name, part in adapter.parts.items():
        trained_on, original = emulator.part(name), base.part(name)
        part_weights(part, original)
        if trained_on.digest() != original.digest():
            raise MismatchError(
                f"Adapter {part.path} was trained on the {name} of {emulator.name}, and that of "
                f"{base.name} holds other weights; pass the model that the emulator was made from."
            )


def _carry_over(part: Adapter, base: Checkpoint, folder: Path) -> None:
    """There is no mismatch to correct: only the name of the base changes."""
    copy_file(part.path / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    write_json(
        folder / CONFIG_NAME, {**part.config, "base_model_name_or_path": base.reference_name()}
    )


def _emulator_manifest(emulator: str) -> Manifest:
    manifest = Manifest.read(Path(emulator))
    if manifest.kind != "emulator":
        raise MismatchError(f"{emulator} is no emulator; its manifest says {manifest.kind}.")
    if manifest.method is not None:
        raise MismatchError(
            f"{emulator} is the light model of the method {manifest.method}, whose adapters go back to "
            f"the original in their own way and not by correction; use Method.recover, or emloc bench."
        )
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
    folder = folder_named(adapter)
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
    if not _compares(config) and config.strength is None:
        return []
    return family.calibration_batches(base, config)
