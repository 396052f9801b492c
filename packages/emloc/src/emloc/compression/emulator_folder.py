"""The emulator's folder while it is being written: one shard per block, one for the rest.

Beside a finished block's shard stands a small report, by which an interrupted run knows the block is
done; the manifest takes the reports up at the end.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.file_digest import file_sha256
from emloc.artefacts.json_files import read_json
from emloc.artefacts.layout import Layout
from emloc.artefacts.schema import Schema, conforming
from emloc.artefacts.shard_writer import ShardWriter
from emloc.artefacts.small_files import copy_file, write_json
from emloc.compression.choice import emulator_dtype
from emloc.compression.groups import CompressionPlan, Group
from emloc.compression.vocabulary import replaced_by, write_table
from emloc.errors import CheckpointError
from emloc.extend.family import EmulatorLayers
from emloc.formats.abilities import Cuttable
from emloc.formats.layer_format import Form, StoredTensor, Tensors
from emloc.options.types import Dtype
from emloc.streaming.stream import UnitStream

Declared = dict[str, tuple[torch.dtype, tuple[int, ...]]]

SPECTRUM = "spectrum"
"""The key in a block's report of the spectrum of a group whose size is still open."""


class _Report(Schema):
    """Entries of a block's report that are looked at."""

    layers: dict[str, dict[str, Any]]
    unreached: list[str]


@dataclass
class EmulatorFolder:
    """Names, shards and the final index of an emulator.

    Attributes:
        stream: the base model, for its names.
        plan: the groups and their forms.
        dtype: of all weights, but for tensors that have their own in a form; `auto` keeps the base's.
        work: where to write.
    """

    stream: UnitStream
    plan: CompressionPlan
    dtype: Dtype
    work: Path

    @property
    def base(self) -> Checkpoint:
        """The checkpoint that is compressed."""
        return self.stream.checkpoint

    @property
    def shards(self) -> list[str]:
        """File names: a shard per block in forward order, and the rest last."""
        return self.layout.shards(len(self.stream.blocks) + 1)

    @property
    def layout(self) -> Layout:
        """Names of the emulator's files: as the base's."""
        return self.base.layout

    def report_path(self, block: str) -> Path:
        """The file that says a block is done."""
        return self.work / f"block-{self.stream.blocks.index(block) + 1:05d}.json"

    def read_report(self, block: str) -> dict[str, Any]:
        """The report that `write_block` was given for a finished block."""
        return read_json(self.report_path(block))

    def finished_blocks(self) -> set[str]:
        """Blocks that an interrupted run completed in the forms of the plan, and whose shards are whole.

        Where forms are chosen by what was computed, another device or version may choose others; such a
        block is made anew.
        """
        begun = (block for block in self.stream.blocks if self.report_path(block).is_file())
        return {block for block in begun if self._is_as_planned(block) and self._is_whole(block)}

    def _is_whole(self, block: str) -> bool:
        files = self.read_report(block)["sha256"].items()
        return all(
            (self.work / name).is_file() and file_sha256(self.work / name) == digest
            for name, digest in files
        )

    def _is_as_planned(self, block: str) -> bool:
        try:
            path = self.report_path(block)
            report = conforming(_Report, read_json(path), path)
        except CheckpointError:
            return False
        made, unreached = report.layers, set(report.unreached)
        planned = {
            group.owner: group
            for group in self.plan.within(block)
            if not unreached.issuperset(group.layers)
        }
        return made.keys() == planned.keys() and all(
            _is_of(group, made[owner]) for owner, group in planned.items()
        )

    def write_block(
        self,
        block: str,
        fitted: Mapping[str, Tensors],
        report: Mapping[str, Any],
    ) -> None:
        """Write a block's shard, then its report.

        Args:
            fitted: by a group's owner, its stored tensors; a group that is not in it stays dense.
            report: JSON for the manifest.
        """
        tensors: dict[str, Tensor] = {}
        replaced: set[str] = set()
        for group in self.plan.within(block):
            if group.owner not in fitted:
                continue
            for name, stored in self.stored(group, group.fitted).items():
                tensor = fitted[group.owner][stored.layer, stored.name]
                tensors[name] = tensor.to(stored.dtype).reshape(stored.shape)
            replaced.update(self.stream.weight_name(layer) for layer in group.layers)
        for name in self._block_tensors(block):
            if name not in replaced:
                stored = self.base.read(name)
                tensors[name] = stored.to(self._target_dtype(stored.dtype))
        declared: Declared = {n: (t.dtype, tuple(t.shape)) for n, t in sorted(tensors.items())}
        file = self.shards[self.stream.blocks.index(block)]
        with ShardWriter(self.work / file, declared, self.base.name) as shard:
            for name in declared:
                shard.write(name, tensors[name])
        write_json(self.report_path(block), {**report, "sha256": {file: shard.sha256}})

    def forget_block(self, block: str) -> None:
        """Have a block count as not done, if it was."""
        self.report_path(block).unlink(missing_ok=True)

    def emulated(self, block: str) -> dict[str, Tensor]:
        """The weights that a finished block's tensors on disk stand for; see `dense_of`."""
        file = self.shards[self.stream.blocks.index(block)]
        shard = Checkpoint.from_files(str(self.work), self.work, {}, {file: None})
        made = self.read_report(block)["layers"]
        weights: dict[str, Tensor] = {}
        for group in (group for group in self.plan.within(block) if group.owner in made):
            weights |= self._dense(group, lambda at, name: shard.read(self._tensor_name(at, name)))
        return weights

    def dense_of(self, group: Group, fitted: Tensors) -> dict[str, Tensor]:
        """The weights that a group's tensors stand for once they are stored.

        Returns:
            By the names of the parameters that they replace, in their shapes and in the stream's dtype.
        """
        stored = {(s.layer, s.name): s for s in self.stored(group, group.fitted).values()}
        return self._dense(
            group,
            lambda at, name: (
                fitted[at, name].to(stored[at, name].dtype).reshape(stored[at, name].shape)
            ),
        )

    def _dense(self, group: Group, read: Callable[[str, str], Tensor]) -> dict[str, Tensor]:
        stream, form = self.stream, group.fitted
        weights: dict[str, Tensor] = {}
        for layer in group.layers:
            operator = form.format.operator(
                group.shape, form, layer, lambda at, name: read(at, name).to(stream.device)
            )
            dense = operator.dense(stream.dtype)
            if stream.stored(f"{layer}.weight").transposed:
                dense = dense.T
            expected = stream.model.get_parameter(f"{layer}.weight").shape
            weights[f"{layer}.weight"] = dense.reshape(expected)
        return weights

    def finish(self) -> tuple[list[dict[str, Any]], dict[str, str], Checkpoint]:
        """Write what is in no block, the index, the config and the tokenizer's files.

        Returns:
            The blocks' reports, the SHA-256 of each shard, and the emulator opened.
        """
        rest = self._write_rest()
        written = Checkpoint.from_files(
            str(self.work), self.work, {}, dict.fromkeys(self.shards, None)
        )
        total = sum(info.nbytes for info in written.tensors.values())
        weight_map = {name: self.layout.inside(info.file) for name, info in written.tensors.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.work / self.layout.index, index)
        reports = [self.read_report(block) for block in self.stream.blocks]
        compressed = {owner for report in reports for owner in report["layers"]}
        for entry in (entry for report in reports for entry in report["layers"].values()):
            entry.pop(SPECTRUM, None)  # thousands of numbers, of use until sizes are known
        layers = EmulatorLayers(
            [group.as_json() for group in self.plan.groups if group.owner in compressed],
            None if self.dtype == "auto" else self.dtype,
            [table.as_json() for table in self.plan.tables],
        )
        config = self.stream.family.emulator_config(self.base, layers)
        write_json(self.work / self.layout.config, config)
        for name in self.base.companions():
            copy_file(self.base.path / name, self.work / name)
        digests: dict[str, str] = {}
        for report in reports:
            digests.update(report["sha256"])
        return reports, {**digests, self.shards[-1]: rest}, written

    @property
    def reports(self) -> list[str]:
        """Names of what only a continuation needs; the manifest holds it in the end."""
        return [self.report_path(block).name for block in self.stream.blocks]

    def _write_rest(self) -> str:
        inside = {name for block in self.stream.blocks for name in self._block_tensors(block)}
        tables = [(replaced_by(self.stream, table), table) for table in self.plan.tables]
        inside |= {name for names, _ in tables for name in names}
        declared: Declared = {
            name: (self._target_dtype(info.dtype), info.shape)
            for name, info in self.base.tensors.items()
            if name not in inside
        }
        coded = {name: size for _, table in tables for name, size in table.sizes.items()}
        file = self.work / self.shards[-1]
        with ShardWriter(file, {**declared, **coded}, self.base.name) as shard:
            for name, (dtype, _) in declared.items():
                shard.write(name, self.base.read(name).to(dtype))
            for names, table in tables:
                write_table(shard, table, self.base.read(names[0]))
        return shard.sha256

    def _block_tensors(self, block: str) -> list[str]:
        module = self.stream.model.get_submodule(block)
        names = {
            name
            for path, _ in module.named_parameters()
            for name in self.stream.stored(f"{block}.{path}").names
        }
        return sorted(names | {n for n in self.base.tensors if n.startswith(f"{block}.")})

    def stored(self, group: Group, form: Form) -> dict[str, StoredTensor]:
        """A group's tensors by their names in the checkpoint, with their dtypes."""
        return {
            self._tensor_name(stored.layer, stored.name): stored
            if stored.dtype
            else stored._replace(dtype=self._dtype_of(stored.layer))
            for stored in form.format.stored(group.shape, form)
        }

    def _tensor_name(self, layer: str, name: str) -> str:
        return self.stream.weight_name(layer).removesuffix("weight") + name

    def _dtype_of(self, layer: str) -> torch.dtype:
        return self._target_dtype(self.base.tensors[self.stream.weight_name(layer)].dtype)

    def _target_dtype(self, stored: torch.dtype) -> torch.dtype:
        return emulator_dtype(stored, self.dtype)


def _is_of(group: Group, entry: Mapping[str, Any]) -> bool:
    """Return whether a report's entry is of a group: as it is fitted, or cut down from that already."""
    expected: dict[str, Any] = {
        "layers": list(group.layers),
        "format": None,
        **group.fitted.as_json(),
    }
    if group.wide is not None and SPECTRUM in entry:
        assert isinstance(group.form.format, Cuttable)
        unit = group.form.format.unit
        widest, size = expected.pop(unit), entry.get(unit)
        if not isinstance(size, int) or not 0 < size <= widest:
            return False
    return all(entry.get(key) == value for key, value in expected.items())
