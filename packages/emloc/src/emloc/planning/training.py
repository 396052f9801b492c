"""The memory of training: weights, what is trained, gradients, optimiser, and the step's largest moment.

Optimisers hold per trained parameter so many elements of its dtype (AdamW: two moments). Those of 8
bits (bitsandbytes) hold a byte for each, and a float32 scale per 256; tensors of fewer than 4096 elements
stay in 32 bits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from emloc.compression.groups import Group
from emloc.config import CompressConfig, TrainConfig
from emloc.extend.family import Batch
from emloc.formats.vocabulary import VocabularyTable
from emloc.machine.remembered import Remembered
from emloc.planning.family import traced_loss
from emloc.planning.layers import planned_layers
from emloc.planning.ledger import lines_of
from emloc.planning.operations import Layer
from emloc.planning.rates import Rates
from emloc.planning.step import Instant, Precision, StepOptions, StepSizes
from emloc.planning.subject import Subject
from emloc.planning.trace import Depths, extrapolate, trace_step
from emloc.planning.work import of_depth, seconds_of

LoraShapes = Sequence[tuple[int, int]]
"""Rows and columns of the trainable matrices."""


def lora_shapes(layers: Mapping[str, Layer], config: TrainConfig) -> LoraShapes:
    """A, B, and DoRA's magnitude of every adapted layer."""
    shapes: list[tuple[int, int]] = []
    for layer in layers.values():
        if layer.lora_rank:
            shapes += [(layer.lora_rank, layer.d_in), (layer.d_out, layer.lora_rank)]
            shapes += [(layer.d_out, 1)] if config.use_dora else []
    return shapes


def optimizer_bytes(optim: str, shapes: LoraShapes, itemsize: int) -> int:
    """The bytes that an optimiser keeps of trainable matrices; see transformers' names."""
    kept = 0
    for rows, columns in shapes:
        numel = rows * columns
        if "8bit" in optim and numel >= 4096:
            kept += _moments(optim) * (numel + -(-numel // 256) * 4)
        elif optim == "adafactor":
            kept += (rows + columns if min(rows, columns) > 1 else numel) * 4
        else:
            kept += _moments(optim) * numel * itemsize + 4
    return kept


def _moments(optim: str) -> int:
    """Elements kept per parameter; Prodigy keeps where it began and a running sum besides."""
    return {"sgd": 0, "prodigy": 4}.get(optim, 2)


def lora_itemsize(weights: int) -> int:
    """PEFT keeps LoRAs of half-precision models in float32."""
    return max(weights, 4)


def planned_step(
    subject: Subject,
    groups: Sequence[Group],
    config: TrainConfig,
    tables: Sequence[VocabularyTable] = (),
) -> tuple[StepSizes | None, Mapping[str, Layer], str]:
    """A training step, the layers with their LoRA, and by which way it was counted."""
    family = subject.planned
    if family is None:
        return None, {}, "not counted: the family does not say how it trains"
    adapted = subject.adapted(config)
    weights = subject.itemsize(config.dtype)
    layers = planned_layers(subject.model, subject.shapes, groups, adapted, config, weights, tables)
    batch = family.planned_batch(subject.checkpoint, config, config.per_device_train_batch_size)
    on_gpu = config.device.startswith("cuda")
    options = StepOptions(
        Precision(weights, lora_itemsize(weights), autocast=on_gpu),
        config.gradient_checkpointing,
        on_gpu,
        config.stream,
    )
    if is_plain(config):
        sizes = family.step_sizes(subject.model, layers, batch, options)
        if sizes is not None:
            return sizes, layers, "closed form"

    def count(blocks: Sequence[int]) -> StepSizes:
        def traced() -> StepSizes:
            model = shallow_model(subject, groups, config, tables, blocks)
            return trace_step(model, batch, traced_loss(subject.family), on_gpu)

        return STEPS.answer(_traced_as(subject, groups, config, tables, blocks, batch), traced)

    return extrapolate(Depths(family.stacks(subject.checkpoint), count)), layers, "trace"


STEPS: Remembered[StepSizes] = Remembered(256)
"""Steps that were traced in this process, which plans of one run have in common."""

SECONDS: Remembered[float] = Remembered(256)
"""Seconds of steps that were traced in this process, at the rates of a machine."""

NOT_OF_A_STEP = frozenset(CompressConfig.model_fields) - frozenset(TrainConfig.model_fields) | {
    "output_dir", "emulator", "model_name_or_path", "dataset", "memory", "seed", "learning_rate", "max_steps",
    "num_train_epochs", "save_steps", "logging_steps", "gradient_accumulation_steps", "stream", "lora_alpha",
    "use_rslora",
}  # fmt: skip
"""Options that neither change what the model is that is trained, groups given, nor what one step holds."""


def _traced_as(
    subject: Subject,
    groups: Sequence[Group],
    config: TrainConfig,
    tables: Sequence[VocabularyTable],
    blocks: Sequence[int],
    batch: Batch,
) -> tuple[type, str]:
    """All that a traced step depends on: the kind of family, and the rest as text."""
    parts = {
        "config": subject.checkpoint.config,
        "stored": str(subject.stored),
        "groups": [group.as_json() for group in groups],
        "tables": [table.as_json() for table in tables],
        "blocks": list(blocks),
        "batch": {name: (str(t.dtype), list(t.shape)) for name, t in batch.items()},
        "options": config.model_dump(mode="json", exclude=set(NOT_OF_A_STEP)),
    }
    return type(subject.family), json.dumps(parts, default=str)


def shallow_model(
    subject: Subject,
    groups: Sequence[Group],
    config: TrainConfig,
    tables: Sequence[VocabularyTable],
    blocks: Sequence[int],
) -> nn.Module:
    """The model as training has it, on the meta device, with so many blocks in each stack."""
    family = subject.planned
    assert family is not None
    few = family.shallow(subject.checkpoint, blocks) if blocks else subject.checkpoint
    names = {name for name, _ in subject.family.skeleton(few, torch.float32).named_modules()}
    inside = [group for group in groups if names.issuperset(group.layers)]
    # A shallow model lacks the blocks that were chosen; with a LoRA on all it takes no less.
    chosen: dict[str, Any] = {"embedding_bits": tables[0].bits if tables else None}
    chosen |= {"lora_layers_to_transform": [], "lora_layers_pattern": []} if blocks else {}
    return family.trainable(few, inside, config.model_copy(update=chosen))


def step_seconds(
    subject: Subject,
    groups: Sequence[Group],
    config: TrainConfig,
    tables: Sequence[VocabularyTable],
    rates: Rates,
) -> float | None:
    """Seconds of an optimiser's step; None where the family does not say how it trains."""
    family = subject.planned
    if family is None:
        return None
    batch = family.planned_batch(subject.checkpoint, config, config.per_device_train_batch_size)
    on_gpu = config.device.startswith("cuda")

    def seconds(blocks: Sequence[int]) -> float:
        def traced() -> float:
            model = shallow_model(subject, groups, config, tables, blocks)
            return seconds_of(model, batch, traced_loss(subject.family), on_gpu, rates)

        kind, text = _traced_as(subject, groups, config, tables, blocks, batch)
        return SECONDS.answer((kind, f"{text} at {rates}"), traced)

    once = of_depth(family.stacks(subject.checkpoint), seconds)
    return config.gradient_accumulation_steps * once


def is_plain(config: TrainConfig) -> bool:
    """Return whether a LoRA is what the closed forms know."""
    return not (config.use_dora or config.lora_dropout or config.lora_modules_to_save)


@dataclass(frozen=True)
class Trained:
    """The tensors that a step changes.

    Attributes:
        lora: the trainable matrices of the LoRA.
        lora_itemsize: bytes of their elements.
        whole: shapes of the parameters that are trained whole.
        whole_itemsize: bytes of their elements.
    """

    lora: LoraShapes
    lora_itemsize: int
    whole: LoraShapes = ()
    whole_itemsize: int = 0

    @property
    def lora_bytes(self) -> int:
        """Bytes of the LoRA."""
        return sum(rows * columns for rows, columns in self.lora) * self.lora_itemsize

    @property
    def whole_bytes(self) -> int:
        """Bytes of the copies that are trained whole."""
        return sum(rows * columns for rows, columns in self.whole) * self.whole_itemsize

    @property
    def bytes(self) -> int:
        """Bytes of both, as they are saved."""
        return self.lora_bytes + self.whole_bytes


def training_lines(
    weights: int, trained: Trained, step: StepSizes | None, config: TrainConfig
) -> dict[str, int]:
    """The lines of a device, but for the allocator's slack."""
    instant = step.largest if step else Instant()
    optimiser = optimizer_bytes(config.optim, trained.lora, trained.lora_itemsize)
    optimiser += optimizer_bytes(config.optim, trained.whole, trained.whole_itemsize)
    return lines_of(
        weights=weights,
        LoRA=trained.lora_bytes,
        modules_to_save=trained.whole_bytes,
        gradients=trained.bytes,
        optimiser=optimiser,
        activations=instant.kept,
        logits_and_loss=instant.loss,
        working_tensors=instant.working,
    )


def without_lora(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The same layers, nothing on them."""
    return {name: replace(layer, lora_rank=0) for name, layer in layers.items()}
