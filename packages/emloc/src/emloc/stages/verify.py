"""Check what a stage wrote: digests, shapes, finiteness, and keys against the base's configuration."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from emloc.adapters.adapted_weights import adapted_weights, part_weights
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import named_base
from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.kinds import ADAPTER, CORRECTED_ADAPTER, EMULATOR, MERGED_MODEL
from emloc.artefacts.manifest import MANIFEST_NAME, Manifest
from emloc.artefacts.named_files import named_file
from emloc.compression.groups import dense_shapes, written_groups
from emloc.config import VerifyConfig
from emloc.errors import CheckpointError, EmlocError, MismatchError, NumericalError
from emloc.extend.capabilities import native_of
from emloc.extend.family import ModelFamily
from emloc.extend.opening import family_of, open_model
from emloc.extend.plugins import family_named
from emloc.formats.vocabulary import VocabularyTable, tables_of
from emloc.linalg.finite import is_finite, is_mask
from emloc.machine.progress import progress_bar
from emloc.stages.stage import stage


@stage(VerifyConfig, consumes={"path": (EMULATOR, ADAPTER, CORRECTED_ADAPTER, MERGED_MODEL)})
def verify(config: VerifyConfig) -> dict[str, Any]:
    """Check a folder; returns what was checked.

    Raises:
        EmlocError: the first thing found wrong.
    """
    if not config.path.is_dir():
        raise CheckpointError(
            f"No folder {config.path}; pass an emulator, adapter or merged model."
        )
    manifest = Manifest.find(config.path)
    if (config.path / CONFIG_NAME).is_file():
        return _verify_adapter(config, manifest)
    checkpoint = Checkpoint.open(str(config.path))
    checked = _verify_files(config.path, manifest)
    if manifest is None or config.family is not None:
        family = family_of(checkpoint, config.family)
    else:
        family = family_named(manifest.family)
    checkpoint = native_of(family, checkpoint)
    if manifest is not None and manifest.kind == "emulator":
        if manifest.method is None:  # what others hold, only they know
            _verify_emulator(checkpoint, manifest, family)
        _verify_base(config, manifest)
    else:
        _verify_parameters(checkpoint, family)
    finite = _verify_finite(checkpoint)
    kind = manifest.kind if manifest else "model"
    return {"path": str(config.path), "kind": kind, "files": checked, "tensors": finite}


def _verify_files(folder: Path, manifest: Manifest | None) -> int:
    for name, digest in (manifest.files if manifest else {}).items():
        if file_sha256(named_file(folder, name, folder / MANIFEST_NAME)) != digest:
            raise CheckpointError(
                f"{folder / name} is not what was written (SHA-256 differs); make it again."
            )
    return len(manifest.files) if manifest else 0


def _verify_finite(checkpoint: Checkpoint) -> int:
    with progress_bar("verify", len(checkpoint.tensors)) as advance:
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            if not is_finite(tensor) and not is_mask(tensor):
                raise NumericalError(f"Tensor {name} of {checkpoint.path} holds NaN or infinity.")
            advance(note=name)
    return len(checkpoint.tensors)


def _verify_parameters(checkpoint: Checkpoint, family: ModelFamily) -> None:
    model = family.skeleton(checkpoint, torch.float32)
    for name, parameter in model.named_parameters():
        entry = family.stored(model, name, checkpoint)
        if entry is None:
            raise CheckpointError(f"{checkpoint.path} holds no tensor for {name}.")
        stored = entry.plain_name
        if stored is not None and checkpoint.tensors[stored].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{stored} of {checkpoint.path} is {checkpoint.tensors[stored].shape}; its config "
                f"implies {tuple(parameter.shape)}."
            )


def _verify_emulator(checkpoint: Checkpoint, manifest: Manifest, family: ModelFamily) -> None:
    model = family.skeleton(checkpoint, torch.float32)
    groups = written_groups(manifest.layers, dense_shapes(manifest.layers, model))
    expected = {
        f"{tensor.layer}.{tensor.name}": tensor
        for group in groups
        for tensor in group.form.format.stored(group.shape, group.form)
    }
    tables = tables_of(manifest.tables)
    emulated = {name for group in (*groups, *tables) for name in group.layers}
    _verify_tables(checkpoint, tables)
    prefix = _prefix(checkpoint, expected)
    stored = {name.removeprefix(prefix): info for name, info in checkpoint.tensors.items()}
    for name, tensor in expected.items():
        # They bear the names of the weights in the checkpoint, which may not be the module's.
        renamed = family.stored(model, name, checkpoint)
        info = checkpoint.tensors[renamed.names[0]] if renamed else stored.get(name)
        shape = info.shape if info else "missing"
        if shape != tensor.shape:
            raise CheckpointError(
                f"{name} of {checkpoint.path} should be {tensor.shape}, is {shape}."
            )
        if info and tensor.dtype not in (None, info.dtype):
            raise CheckpointError(
                f"{name} of {checkpoint.path} should be {tensor.dtype}, is {info.dtype}."
            )
    for name, _ in model.named_parameters():
        layer = name.rpartition(".")[0]
        dense = layer not in emulated or not name.endswith(".weight")
        if dense and family.stored(model, name, checkpoint) is None:
            raise CheckpointError(f"{checkpoint.path} holds no tensor for {name}.")


def _verify_tables(checkpoint: Checkpoint, tables: Iterable[VocabularyTable]) -> None:
    for table in tables:
        for name, expected in table.sizes.items():
            info = checkpoint.tensors.get(name)
            stored = (info.dtype, info.shape) if info else "missing"
            if stored != expected:
                raise CheckpointError(
                    f"{name} of {checkpoint.path} should be {expected}, is {stored}."
                )


def _prefix(checkpoint: Checkpoint, expected: Iterable[str]) -> str:
    """The prefix that the checkpoint puts before module names, if any."""
    first = next(iter(expected))
    for name in checkpoint.tensors:
        if name.endswith(first):
            return name.removesuffix(first)
    return ""


def _verify_base(config: VerifyConfig, manifest: Manifest) -> None:
    origin = manifest.base_model
    name = config.model_name_or_path or origin.name_or_path
    if config.model_name_or_path is None and not _is_here(name):
        return  # the base is elsewhere, and nobody asked for it
    sources = config.single_file_config or origin.single_file_config
    base, _ = open_model(name, sources, config.family, manifest.family)
    if base.digest() != origin.digest:
        raise MismatchError(f"{config.path} was made from other weights than those of {name}.")


def _is_here(name: str) -> bool:
    """Return whether a recorded name is of something on this machine; a folder below ours may be
    another.
    """
    return os.path.isabs(name) and Path(name).exists()


def _verify_adapter(config: VerifyConfig, manifest: Manifest | None) -> dict[str, Any]:
    adapter = Adapter.open(str(config.path))
    checked = _verify_files(config.path, manifest)
    name = config.model_name_or_path or named_base(adapter, manifest)
    base = family = None
    if name and (config.model_name_or_path or _is_here(name)):
        named = manifest.base_model.single_file_config if manifest else None
        recorded = manifest.family if manifest else None
        base, family = open_model(name, config.single_file_config or named, config.family, recorded)
    paths = [Path(file).parts for file in (manifest.files if manifest else ())]
    listed = {parts[0] for parts in paths if len(parts) == 2}
    adapter = adapter.with_parts(sorted(listed | set(base.parts if base else ())))

    def fail(key: str) -> EmlocError:
        return NumericalError(f"{key} of {config.path / WEIGHTS_NAME} holds NaN or infinity.")

    adapter.require_finite(fail)
    if manifest is not None and manifest.kind == "corrected_adapter":
        _verify_base(config, manifest)
    against = None
    if base is not None and family is not None and "quantization_config" not in base.config:
        model = family.skeleton(base, torch.float32)
        adapter = adapted_weights(adapter, family, model, base).adapter
        for part in adapter.parts:
            part_weights(adapter.parts[part], base.part(part))
        against = name
    return {
        "path": str(config.path),
        "kind": manifest.kind if manifest else "adapter",
        "files": checked,
        "tensors": sum(len(each.tensors.tensors) for each in (adapter, *adapter.parts.values())),
        "layers": sum(len(each.layers) for each in (adapter, *adapter.parts.values())),
        "base_model": against,
    }
