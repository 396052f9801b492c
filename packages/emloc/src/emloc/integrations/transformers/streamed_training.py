"""Training a LoRA on a base whose blocks are in memory one at a time, with transformers' Trainer."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import transpose
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import TrainConfig
from emloc.extend.family import ModelFamily
from emloc.streaming.streamed_model import StreamedModel


def frozen_model(
    family: ModelFamily, checkpoint: Checkpoint, config: TrainConfig, work: Path
) -> Any:
    """The model to train a LoRA on: loaded, or with `stream` a skeleton that is filled block by block.

    Args:
        work: a folder on whose disk inputs of blocks may be kept.
    """
    if not config.stream:
        return family.load(checkpoint, config.dtype, config.device)
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    streamed = StreamedModel(
        family,
        checkpoint,
        dtype,
        config.device,
        config.stream_from,
        config.stream_inputs,
        work,
        config.stream_bits,
    )
    return streamed.model


@torch.no_grad()
def set_magnitudes(streamed: StreamedModel) -> None:
    """Give DoRA's magnitudes the norms of the weights, which were not there when it was put on."""
    for unit in streamed.units():
        for layer in unit.modules():
            if isinstance(layer, LoraLayer):
                for magnitude in layer.lora_magnitude_vector.values():
                    weight = cast(Any, layer.get_base_layer()).weight
                    held = cast(Any, magnitude)
                    nothing = torch.zeros_like(transpose(weight, held.fan_in_fan_out))
                    norm = held.get_weight_norm(weight, nothing, 1)
                    held.weight.data.copy_(norm.reshape(held.weight.shape))


@torch.no_grad()
def fill_saved(streamed: StreamedModel) -> None:
    """Give modules that are trained whole the weights that were not there when PEFT copied them."""
    copies: dict[int, nn.Module] = {}
    for wrapper in streamed.model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            [copied] = cast(Any, wrapper.modules_to_save).values()
            original = cast(nn.Module, wrapper.original_module)
            for path, module in original.named_modules():
                copies[id(module)] = twin = copied.get_submodule(path)
                if isinstance(
                    twin, nn.Embedding
                ):  # of a table on file; it is trained, so it is not one
                    twin.weight.data = streamed.computed(twin.weight.data)
    if copies:
        for owner, leaf, value in streamed.values():
            if id(owner) in copies:
                copies[id(owner)].get_parameter(leaf).copy_(value)


class StreamedSteps:
    """Goes before a Trainer among the bases of its class: all micro-batches of a step at once.

    Attributes:
        streamed: the model that is trained.
    """

    streamed: StreamedModel
    _batches: list[Any]
    _losses: list[Tensor]

    def get_batch_samples(self: Any, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """The Trainer's micro-batches of a step, which are remembered."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)  # pyright: ignore
        self._batches, self._losses = list(batches), []
        return batches, count

    def training_step(
        self: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of one micro-batch; the first of a step brings the gradients of all."""
        if not self._losses:
            model.train()
            if callable(getattr(self.optimizer, "train", None)):
                self.optimizer.train()
            losses = [
                partial(self._loss_of, model, batch, num_items_in_batch) for batch in self._batches
            ]
            with self.compute_loss_context_manager():
                self._losses = self.streamed.gradients(losses)
        return self._losses.pop(0)

    def _loss_of(self: Any, model: nn.Module, batch: Any, count: Any) -> tuple[Tensor, Tensor]:
        """One micro-batch's share of the step's mean, as the Trainer's own `training_step` has it."""
        inputs = self._prepare_inputs(batch)
        loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            by_count = self.model_accepts_loss_kwargs and count is not None
            scaled = by_count or self.compute_loss_func is not None
        loss = loss if scaled else loss / self.current_gradient_accumulation_steps
        return loss, loss.detach()

    def prediction_step(self: Any, *given: Any, **named: Any) -> Any:
        """The Trainer's, block by block."""
        [made] = self.streamed.run([partial(super().prediction_step, *given, **named)])  # pyright: ignore
        return made


def stream_steps(trainer: Any, streamed: StreamedModel) -> None:
    """Have a trainer take its steps block by block."""
    kind = type(trainer)
    trainer.__class__ = type(f"Streamed{kind.__name__}", (StreamedSteps, kind), {})
    trainer.streamed = streamed
