"""Ranks that are known after the pass: blocks are written wide, and rewritten narrow.

The factors `U_K` and `U_Kᵀ W` of rank K hold those of every smaller rank k, the first k columns and rows.
So one pass over the base model writes factors of the largest rank that a layer may get, with the
eigenvalues in the block's report; when all blocks are there, ranks are allocated, and shard after shard
is written anew with less in it. Memory is one tensor.

A shard that is cut already stays as it is when it is cut again, and ranks follow from the reports alone:
a run that is killed here ends with the same bytes.
"""

from typing import Any

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import write_json
from emloc.compression.emulator_folder import SPECTRUM, EmulatorFolder
from emloc.linalg.allocation import Candidate, allocate, predicted_error
from emloc.linalg.lowrank import relative_error
from emloc.machine.progress import console, progress_bar


def allocate_ranks(folder: EmulatorFolder) -> dict[str, float]:
    """Allocate ranks to the groups of all finished blocks, and cut their factors down to them.

    Returns:
        Predicted errors (`linalg.allocation.predicted_error`) of the uniform ranks and of the allocated.
    """
    candidates = _candidates(folder)
    ranks = allocate(candidates)
    errors = {
        "uniform": predicted_error(candidates, {n: one.uniform for n, one in candidates.items()}),
        "allocated": predicted_error(candidates, ranks),
    }
    shares = [ranks[name] / one.uniform for name, one in candidates.items()] or [1.0]
    console.print(
        f"compress: ranks from {min(shares):.2f} to {max(shares):.2f} of the uniform ones; predicted "
        f"error of the hidden state {errors['allocated']:.4f} (uniform {errors['uniform']:.4f})"
    )
    folder.plan = folder.plan.with_ranks(ranks)
    with progress_bar("cut", len(folder.stream.blocks)) as advance:
        for block in folder.stream.blocks:
            _cut(folder, block)
            advance(note=block)
    return errors


def _candidates(folder: EmulatorFolder) -> dict[str, Candidate]:
    """Groups with a range of ranks that calibration tokens reached."""
    found: dict[str, Candidate] = {}
    for block in folder.stream.blocks:
        entries = folder.read_report(block)["layers"]
        for group in folder.plan.within(block):
            entry = entries.get(group.owner, {})
            if group.span is not None and SPECTRUM in entry:
                found[group.owner] = Candidate(
                    entry[SPECTRUM]["values"],
                    entry[SPECTRUM]["total"],
                    group.rank,
                    group.span[0],
                    sum(group.d_out) + group.d_in,
                    entry["sensitivity"],
                )
    return found


def _cut(folder: EmulatorFolder, block: str) -> None:
    """Write a block's shard and report anew, with the plan's ranks."""
    report = folder.read_report(block)
    entries: dict[str, dict[str, Any]] = report["layers"]
    lengths: dict[str, tuple[int, int]] = {}  # by tensor, the dimension to cut and how much remains
    for group in folder.plan.within(block):
        entry = entries.get(group.owner, {})
        if entry.get("rank", group.rank) == group.rank:
            continue
        spectrum = entry[SPECTRUM]
        entry["rank"] = group.rank
        entry["relative_error"] = relative_error(
            spectrum["values"][: group.rank], spectrum["total"]
        )
        lengths[folder.factor(group.owner, "right")] = (0, group.rank)
        for name in group.layers:
            lengths[folder.factor(name, "left")] = (1, group.rank)
    if not lengths:
        return
    file = folder.shards[folder.stream.blocks.index(block)]
    wide = Checkpoint.from_files(str(folder.work), folder.work, {}, {file: None})
    tensors = {
        name: wide.read(name).narrow(*(lengths[name][0], 0, lengths[name][1]))
        if name in lengths
        else wide.read(name)
        for name in wide.tensors
    }
    declared = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with ShardWriter(folder.work / file, declared, folder.base.name) as shard:
        for name, tensor in tensors.items():
            shard.write(name, tensor)
    write_json(folder.report_path(block), {**report, "sha256": {file: shard.sha256}})
