"""Sizes that are known after the pass: blocks are written wide, and rewritten narrow.

A format that can be cut (`Cuttable`; low rank: factors `U_K` and `U_Kᵀ W` hold those of every smaller rank)
has the tensors of every smaller form in those of the largest. So one pass over the base model writes the
largest that a group may become, with its spectrum in the block's report; when all blocks are there, sizes
are allocated, and shard after shard is written anew with less in it. Memory is one tensor.

A shard that is cut already stays as it is when it is cut again, and sizes follow from the reports alone:
a run that is killed here ends with the same bytes.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import write_json
from emloc.compression.emulator_folder import SPECTRUM, EmulatorFolder
from emloc.compression.groups import Group
from emloc.formats.abilities import Cuttable
from emloc.formats.layer_format import Form, Tensors
from emloc.linalg.allocation import Candidate, allocate, predicted_error
from emloc.linalg.lowrank import relative_error
from emloc.machine.progress import console, progress_bar


def allocate_sizes(folder: EmulatorFolder) -> dict[str, float]:
    """Allocate sizes to the groups of all finished blocks, and cut their tensors down to them.

    Returns:
        Predicted errors (`linalg.allocation.predicted_error`) of the uniform sizes and of the allocated.
    """
    candidates = _candidates(folder)
    sizes = allocate(candidates)
    errors = {
        "uniform": predicted_error(candidates, {n: one.uniform for n, one in candidates.items()}),
        "allocated": predicted_error(candidates, sizes),
    }
    shares = [sizes[name] / one.uniform for name, one in candidates.items()] or [1.0]
    console.print(
        f"compress: layers of {min(shares):.2f} to {max(shares):.2f} times their uniform size; predicted "
        f"error of the hidden state {errors['allocated']:.4f} (uniform {errors['uniform']:.4f})"
    )
    forms = {group.owner: group.form for group in folder.plan.groups}
    for name, size in sizes.items():
        forms[name] = forms[name].with_size(_cuttable(forms[name]).unit, size)
    folder.plan = folder.plan.with_forms(forms)
    with progress_bar("cut", len(folder.stream.blocks)) as advance:
        for block in folder.stream.blocks:
            _cut(folder, block)
            advance(note=block)
    return errors


def _cuttable(form: Form) -> Cuttable:
    assert isinstance(form.format, Cuttable)
    return form.format


def _candidates(folder: EmulatorFolder) -> dict[str, Candidate]:
    """Groups with a range of sizes that calibration tokens reached."""
    candidates: dict[str, Candidate] = {}
    for block in folder.stream.blocks:
        entries = folder.read_report(block)["layers"]
        for group in folder.plan.within(block):
            entry = entries.get(group.owner, {})
            if group.wide is not None and SPECTRUM in entry:
                format = _cuttable(group.form)
                candidates[group.owner] = Candidate(
                    entry[SPECTRUM]["values"],
                    entry[SPECTRUM]["total"],
                    group.form.sizes[format.unit],
                    format.span(group.shape, group.form)[0],
                    format.unit_cost(group.shape),
                    entry["sensitivity"],
                )
    return candidates


def _cut(folder: EmulatorFolder, block: str) -> None:
    """Write a block's shard and report anew, with the plan's forms."""
    report = folder.read_report(block)
    entries: dict[str, dict[str, Any]] = report["layers"]
    shapes: dict[str, tuple[int, ...]] = {}  # of the tensors that are cut
    for group in folder.plan.within(block):
        entry = entries.get(group.owner, {})
        if group.wide is None or SPECTRUM not in entry:
            continue
        unit = _cuttable(group.form).unit
        size = group.form.sizes[unit]
        if entry[unit] == size:
            continue
        spectrum = entry[SPECTRUM]
        entry[unit] = size
        entry["relative_error"] = relative_error(spectrum["values"][:size], spectrum["total"])
        stored = folder.stored(group, group.form)
        shapes.update({name: tensor.shape for name, tensor in stored.items()})
    if not shapes:
        return
    file = folder.shards[folder.stream.blocks.index(block)]
    wide = Checkpoint.from_files(str(folder.work), folder.work, {}, {file: None})
    tensors = {
        name: leading(wide.read(name), shapes[name]) if name in shapes else wide.read(name)
        for name in wide.tensors
    }
    declared = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(folder.work / file, declared, folder.base.name) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor)
    write_json(folder.report_path(block), {**report, "sha256": {file: shard.sha256}})


def leading(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements along every axis."""
    for axis, size in enumerate(shape):
        tensor = tensor.narrow(axis, 0, size)
    return tensor


def uniform_weights(group: Group, tensors: Tensors) -> list[Tensor]:
    """A group's weights, d_out × d_in, in its uniform form, made of tensors that were fitted wide."""
    form = group.form
    parts = {
        (stored.layer, stored.name): leading(tensors[stored.layer, stored.name], stored.shape)
        for stored in form.format.stored(group.shape, form)
    }
    first = next(iter(parts.values()))

    def read(layer: str, name: str) -> Tensor:
        return parts[layer, name]

    return [
        form.format.operator(group.shape, form, layer, read).dense(first.dtype)
        for layer in group.layers
    ]
