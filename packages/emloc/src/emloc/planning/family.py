"""The protocol of a family whose activations can be counted before there is a model.

A family that lacks this is planned without them, and the plan says so. One that has it needs no formula:
where `step_sizes` gives none, a step is traced on fake tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.compression.groups import Group
from emloc.config import TrainConfig
from emloc.extend.family import Batch, ModelFamily
from emloc.planning.operations import Layer
from emloc.planning.step import StepOptions, StepSizes

Groups = Sequence[Group]
"""Layers that are emulated together, with their form."""


class OtherModel(NamedTuple):
    """A model beside the one that is compressed.

    Attributes:
        parameters: their number.
        running: bytes of its weights in float32 and of what running it on one sample makes.
    """

    parameters: int
    running: int


@runtime_checkable
class PlannedFamily(Protocol):
    """A `ModelFamily` whose training step can be counted."""

    def planned_batch(self, checkpoint: Checkpoint, options: Any, samples: int) -> Batch:
        """A micro-batch of the largest samples that the options allow, on the meta device.

        As the forward takes it, with labels; the first tensor's first axis is the samples'.
        """
        ...

    def adapted_layers(self, model: nn.Module, options: TrainConfig) -> Sequence[str]:
        """The layers of a skeleton that training puts a LoRA on."""
        ...

    def stacks(self, checkpoint: Checkpoint) -> Sequence[int]:
        """The number of equal blocks of each stack of the model; nothing for a model without stacks."""
        ...

    def shallow(self, checkpoint: Checkpoint, blocks: Sequence[int]) -> Checkpoint:
        """The same model with so many blocks in each stack; `checkpoint` is known by its config alone."""
        ...

    def trainable(self, checkpoint: Checkpoint, groups: Groups, options: TrainConfig) -> nn.Module:
        """The model on the meta device as training has it: `groups` emulated, LoRA, training mode."""
        ...

    def step_sizes(
        self, model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
    ) -> StepSizes | None:
        """A step in closed form; None for an architecture without one.

        Args:
            model: the skeleton.
            layers: its linear layers and convolutions, those that are emulated or have a LoRA as such.
        """
        ...

    def cache_elements(self, model: nn.Module, options: Any) -> int:
        """Numbers that generating one sample of the largest size keeps of its past; 0 without a past."""
        ...

    def other_models(self, checkpoint: Checkpoint, options: Any) -> Mapping[str, OtherModel]:
        """Models that encode the data before a stage, and run beside it at inference, by name."""
        ...


LossOf = Callable[[nn.Module, Batch], tuple[Tensor, int]]
"""A micro-batch's loss, summed, and its number of terms; see `ModelFamily.loss`."""


@runtime_checkable
class TrainersLoss(Protocol):
    """A `PlannedFamily` whose trainer, a library's, comes by the same loss by another way than `loss`.

    What is alive meanwhile differs.
    """

    def trainers_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The loss of a micro-batch as `ModelFamily.loss` gives it, computed as the trainer does."""
        ...


def traced_loss(family: ModelFamily) -> LossOf:
    """The loss that a training step on fake tensors is run to."""
    return family.trainers_loss if isinstance(family, TrainersLoss) else family.loss
