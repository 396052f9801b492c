"""The model that is planned, by its config: its blocks, its layers, and what an emulator of it holds.

Blocks with the same layers of the same shapes are alike: which of them share an input is found out on a
model of few blocks, and holds for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.compression.choice import choose_groups
from emloc.compression.groups import CompressionPlan
from emloc.compression.vocabulary import choose_tables
from emloc.config import CompressConfig, TrainConfig
from emloc.extend.capabilities import kept_dense_of
from emloc.extend.family import ModelFamily
from emloc.formats.layer_format import stored_elements, tensor_bytes
from emloc.formats.vocabulary import VocabularyTable
from emloc.planning.blocks import by_block, kind_of
from emloc.planning.described import describe, with_tensors
from emloc.planning.family import PlannedFamily
from emloc.planning.layers import layer_shapes
from emloc.planning.operations import Layer
from emloc.planning.step import BlockKind
from emloc.planning.whole import Shapes, trained_whole, whole_parameters

KINDS = 2
"""Blocks of a shallow model's stack."""


@dataclass
class Subject:
    """The model that is planned.

    Attributes:
        checkpoint: the base model, by its config.
        family: its family.
        model: its skeleton.
    """

    checkpoint: Described
    family: ModelFamily
    model: nn.Module
    _adapted: frozenset[str] | None = None

    @classmethod
    def of(cls, model_name_or_path: str, dtype: str, family: str | None = None) -> "Subject":
        """The model of a folder or hub id; see `describe`."""
        return cls(*describe(model_name_or_path, dtype, family))

    @classmethod
    def opened(cls, checkpoint: Checkpoint, family: ModelFamily) -> "Subject":
        """The model of an opened checkpoint in its family's layout; of an emulator, that of its base."""
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        described = Described(checkpoint.name, checkpoint.path, config, {})
        largest = max(checkpoint.tensors.values(), key=lambda info: info.nbytes)
        dtype = str(largest.dtype).removeprefix("torch.")
        return cls(described, family, with_tensors(described, family, dtype))

    @property
    def planned(self) -> PlannedFamily | None:
        """The family, if its activations can be counted."""
        return self.family if isinstance(self.family, PlannedFamily) else None

    @cached_property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def bytes(self) -> int:
        """Bytes of the weights as they are stored."""
        stored = sum(info.nbytes for info in self.checkpoint.tensors.values())
        return stored + self._buffer_bytes("auto")

    def weight_bytes(self, dtype: str) -> int:
        """Bytes of the whole model's weights; `auto`: as they are stored."""
        return self.parameters * self.itemsize(dtype) + self._buffer_bytes(dtype)

    def _buffer_bytes(self, dtype: str) -> int:
        """Bytes of what is no parameter and stored all the same, such as BART's bias of the logits."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers = [b for name, b in self.model.state_dict().items() if name not in parameters]
        return sum(
            b.numel() * (self.itemsize(dtype) if b.is_floating_point() else b.itemsize)
            for b in buffers
            if isinstance(b, torch.Tensor)
        )

    @property
    def stored(self) -> torch.dtype:
        """The dtype that the weights are stored in."""
        return next(iter(self.checkpoint.tensors.values())).dtype

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """d_out × d_in of every layer."""
        transposed = {
            name
            for block in self.blocks
            for path, module in self.model.get_submodule(block).named_modules()
            if type(module).__name__ == "Conv1D" and (name := f"{block}.{path}")
        }
        return layer_shapes(self.model, transposed)

    @cached_property
    def blocks(self) -> Sequence[str]:
        """The repeated units."""
        return list(self.family.blocks(self.model))

    @cached_property
    def unit_sizes(self) -> Sequence[int]:
        """Elements of each unit that streams: a block, or a module beside them such as a head.

        Embeddings beside blocks stay on file, and rows are looked up there.
        """

        def numel(module: nn.Module) -> int:
            return sum(parameter.numel() for parameter in module.parameters())

        inside = {id(m) for b in self.blocks for m in self.model.get_submodule(b).modules()}
        beside = [
            sum(parameter.numel() for parameter in module.parameters(recurse=False))
            for module in self.model.modules()
            if id(module) not in inside and not isinstance(module, nn.Embedding)
        ]
        return [*(numel(self.model.get_submodule(block)) for block in self.blocks), *beside]

    @property
    def largest_unit(self) -> int:
        """Elements of the largest of them."""
        return max(self.unit_sizes)

    @cached_property
    def kinds(self) -> Mapping[str, BlockKind]:
        """The common features of each block and those like it, by block."""
        layers = {name: Layer(d_in, d_out) for name, (d_out, d_in) in self.shapes.items()}
        return dict(zip(self.blocks, map(kind_of, by_block(layers, self.blocks))))

    @cached_property
    def inside(self) -> frozenset[str]:
        """Names of all modules in blocks."""
        return frozenset(
            f"{block}.{name}"
            for block in self.blocks
            for name, _ in self.model.get_submodule(block).named_modules()
            if name
        )

    @cached_property
    def groups(self) -> Sequence[Sequence[str]]:
        """Layers that share an input, as the family finds them."""
        return self._from_shallow() or self.family.layer_groups(self.model)

    def _from_shallow(self) -> Sequence[Sequence[str]]:
        """The groups of a model of few blocks for all like them; none if some are like none of them."""
        family = self.planned
        stacks = family.stacks(self.checkpoint) if family else []
        if family is None or all(count <= KINDS for count in stacks):
            return []
        few = family.shallow(self.checkpoint, [min(KINDS, count) for count in stacks])
        model = self.family.skeleton(few, torch.float32)
        known: dict[Any, list[list[str]]] = {}
        groups = self.family.layer_groups(model)
        for block in self.family.blocks(model):
            inside = [[n.removeprefix(f"{block}.") for n in names] for names in groups
                      if names[0].startswith(f"{block}.")]  # fmt: skip
            known.setdefault(_likeness(model, block), inside)
        shared: list[Sequence[str]] = []
        for block in self.blocks:
            likeness = _likeness(self.model, block)
            if likeness not in known:
                return []
            shared += [[f"{block}.{name}" for name in names] for names in known[likeness]]
        return shared

    def adapted(self, config: TrainConfig) -> frozenset[str]:
        """Layers that a LoRA goes on; found once, as fitting changes no option of the LoRA."""
        if self._adapted is None:
            family = self.planned
            names = family.adapted_layers(self.model, config) if family else ()
            whole = {name.rpartition(".")[0] for name in self.whole(config)}
            self._adapted = frozenset(names) - whole
        return self._adapted

    def whole(self, config: TrainConfig) -> Shapes:
        """Parameters that are trained whole."""
        return whole_parameters(self.model, trained_whole(self.family, config))

    @cached_property
    def _kept_dense(self) -> Mapping[str, str]:
        return kept_dense_of(self.family, self.model)

    def emulator(self, config: CompressConfig) -> CompressionPlan:
        """The plan of compress for these options; see `choose_groups` and `choose_tables`."""
        itemsize = self.itemsize(config.dtype)
        plan = choose_groups(
            self.checkpoint.name,
            self.model,
            self.blocks,
            self.groups,
            self._kept_dense,
            config,
            self.weight_shape,
            lambda _: itemsize,
        )
        return replace(plan, tables=self.tables(config.embedding_bits))

    def tables(self, bits: int | None) -> tuple[VocabularyTable, ...]:
        """Embeddings and head in so many bits; see `choose_tables`."""
        return choose_tables(self.family, self.model, self.checkpoint.name, bits)

    def weight_shape(self, layer: str) -> Sequence[int] | None:
        """d_out × d_in of a layer's weight, d_out × channels × height × width of a convolution's."""
        if layer not in self.shapes:
            return None
        kernel = self.model.get_parameter(f"{layer}.weight").shape[2:]
        d_out, d_in = self.shapes[layer]
        return (d_out, d_in // prod(kernel), *kernel)

    def emulator_parameters(self, plan: CompressionPlan) -> int:
        """Elements of an emulator's tensors."""
        changed = sum(
            stored_elements(group.shape, group.form) - group.shape.numel for group in plan.groups
        )
        return self.parameters + changed + sum(t.elements - t.numel for t in plan.tables)

    def emulator_bytes(self, plan: CompressionPlan, dtype: str) -> int:
        """Bytes of an emulator's weights; `auto`: in the base's dtype."""
        itemsize = self.itemsize(dtype)
        saved = sum(
            group.shape.numel * itemsize - tensor_bytes(group.shape, group.form, itemsize)
            for group in plan.groups
        )
        saved += sum(table.numel * itemsize - table.nbytes for table in plan.tables)
        return self.weight_bytes(dtype) - saved

    def bits_per_weight(self, plan: CompressionPlan, dtype: str) -> float:
        """Bits that stand for a weight of a compressed layer; 0 where none is."""
        itemsize = self.itemsize(dtype)
        held = sum(
            group.shape.numel * itemsize
            if group.guessed_dense
            else tensor_bytes(group.shape, group.form, itemsize)
            for group in plan.groups
        )
        return 8 * held / (sum(group.shape.numel for group in plan.groups) or 1)

    def itemsize(self, dtype: str) -> int:
        """Bytes of an element; `auto`: as stored."""
        return (self.stored if dtype == "auto" else getattr(torch, dtype)).itemsize


def _likeness(model: nn.Module, block: str) -> Any:
    module = model.get_submodule(block)
    return tuple((name, tuple(value.shape)) for name, value in module.named_parameters())
