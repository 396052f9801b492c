"""The tensors of a model's folder: finite, and those that its configuration and its manifest imply."""

from collections.abc import Iterable

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.compression.groups import dense_shapes, written_groups
from emloc.errors import CheckpointError, NumericalError
from emloc.extend.family import ModelFamily
from emloc.formats.vocabulary import VocabularyTable, tables_of
from emloc.linalg.finite import is_finite, is_mask
from emloc.machine.progress import progress_bar


def require_finite(checkpoint: Checkpoint) -> int:
    """Refuse NaN and infinity, but in masks; returns how many tensors there are.

    Raises:
        NumericalError: there is one; the message names the tensor.
    """
    with progress_bar("verify", len(checkpoint.tensors)) as advance:
        for name in checkpoint.tensors:
            tensor = checkpoint.read(name)
            if not is_finite(tensor) and not is_mask(tensor):
                raise NumericalError(f"Tensor {name} of {checkpoint.path} holds NaN or infinity.")
            advance(note=name)
    return len(checkpoint.tensors)


def require_parameters(checkpoint: Checkpoint, family: ModelFamily) -> None:
    """Refuse a model that lacks a tensor, or has one of another shape than its configuration implies.

    Raises:
        CheckpointError: it does.
    """
    model = family.skeleton(checkpoint, torch.float32)
    for name, parameter in model.named_parameters():
        entry = family.stored(model, name, checkpoint)
        if entry is None:
            raise CheckpointError(f"{checkpoint.path} holds no tensor for {name}.")
        stored = entry.plain_name
        if stored is not None and checkpoint.tensors[stored].shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{stored} of {checkpoint.path} is {checkpoint.tensors[stored].shape}, but its config "
                f"implies {tuple(parameter.shape)}."
            )


def require_emulator(checkpoint: Checkpoint, manifest: Manifest, family: ModelFamily) -> None:
    """Refuse an emulator whose tensors are not those that its manifest and configuration imply.

    Raises:
        CheckpointError: they are not.
    """
    model = family.skeleton(checkpoint, torch.float32)
    groups = written_groups(manifest.layers, dense_shapes(manifest.layers, model))
    expected = {
        f"{tensor.layer}.{tensor.name}": tensor
        for group in groups
        for tensor in group.form.format.stored(group.shape, group.form)
    }
    tables = tables_of(manifest.tables)
    emulated = {name for group in (*groups, *tables) for name in group.layers}
    _require_tables(checkpoint, tables)
    prefix = _prefix(checkpoint, expected)
    stored = {name.removeprefix(prefix): info for name, info in checkpoint.tensors.items()}
    for name, tensor in expected.items():
        # They bear the names of the weights in the checkpoint, which may not be the module's.
        renamed = family.stored(model, name, checkpoint)
        info = checkpoint.tensors[renamed.names[0]] if renamed else stored.get(name)
        shape = info.shape if info else "missing"
        if shape != tensor.shape:
            raise CheckpointError(
                f"{name} of {checkpoint.path} should be {tensor.shape} but is {shape}."
            )
        if info and tensor.dtype not in (None, info.dtype):
            raise CheckpointError(
                f"{name} of {checkpoint.path} should be {tensor.dtype} but is {info.dtype}."
            )
    for name, _ in model.named_parameters():
        layer = name.rpartition(".")[0]
        dense = layer not in emulated or not name.endswith(".weight")
        if dense and family.stored(model, name, checkpoint) is None:
            raise CheckpointError(f"{checkpoint.path} holds no tensor for {name}.")


def _require_tables(checkpoint: Checkpoint, tables: Iterable[VocabularyTable]) -> None:
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
