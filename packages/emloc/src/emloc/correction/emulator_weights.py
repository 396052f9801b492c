"""An emulator's weights, read from its checkpoint one layer at a time."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.compression.groups import Group, dense_shapes, written_groups
from emloc.extend.family import ModelFamily
from emloc.formats.vocabulary import VocabularyTable, tables_of
from emloc.linalg.operator import Operator


@dataclass(frozen=True)
class EmulatorWeights:
    """`FrozenWeights`.

    Attributes:
        emulator: its tensors.
        groups: the layers that it has in another form.
        weight_names: tensor names of their weights in the base.
        tables: embeddings and heads in few bits.
    """

    emulator: Checkpoint
    groups: Sequence[Group]
    weight_names: Mapping[str, str]
    tables: Sequence[VocabularyTable] = ()
    called: str = "the emulator"
    changed_by: str = "the emulator compresses"
    exempt: str = "exclude the layer when compressing"

    @classmethod
    def of(
        cls,
        folder: str,
        manifest: Manifest,
        family: ModelFamily,
        model: nn.Module,
        base: Checkpoint,
    ) -> "EmulatorWeights":
        """The weights of an emulator of `base`.

        Args:
            model: the base's skeleton.
        """
        entries = manifest.layers
        groups = written_groups(entries, dense_shapes(entries, model))
        names: dict[str, str] = {}
        for layer in (name for entry in entries.values() for name in entry["layers"]):
            stored = family.stored(model, f"{layer}.weight", base)
            if stored is not None and stored.plain_name is not None:
                names[layer] = stored.plain_name
        return cls(Checkpoint.open(folder), groups, names, tables_of(manifest.tables))

    @cached_property
    def _group_of(self) -> Mapping[str, Group]:
        return {name: group for group in self.groups for name in group.layers}

    @cached_property
    def _table_of(self) -> Mapping[str, VocabularyTable]:
        return {name: table for table in self.tables for name in table.layers}

    @property
    def layers(self) -> Collection[str]:
        """See `FrozenWeights`."""
        return {*self._group_of, *self._table_of}

    def operator(self, layer: str, device: torch.device | None = None) -> Operator:
        """See `FrozenWeights`; made of the stored tensors of the layer's group."""
        if layer in self._table_of:
            table = self._table_of[layer]
            return table.matrix.decoded(
                lambda name: self.emulator.read(f"{table.stored_as}{name}").to(device)
            )
        group = self._group_of[layer]

        def read(owner: str, name: str) -> Tensor:
            stem = self.weight_names[owner].removesuffix("weight")
            return self.emulator.read(f"{stem}{name}").to(device)

        return group.form.format.operator(group.shape, group.form, layer, read)
