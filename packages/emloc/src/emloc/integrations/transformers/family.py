"""A family of transformers' models, but for what they read.

From an auto class, inputs to trace, a loss and samples, a subclass gets the rest of what every family gives:
skeleton, stored parameters, blocks, groups of layers, loading, training with the Trainer, a plan whose
steps are traced, evaluation of the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.config import CalibrationOptions, EvaluateConfig, TrainConfig
from emloc.errors import ConfigError, PluginError
from emloc.extend.capabilities import native_of
from emloc.extend.family import Batch, EmulatorLayers, ModelFamily, StoredParameter
from emloc.integrations.transformers.conversion import module_name, stored_parameter
from emloc.integrations.transformers.few_bits import layers_in_few_bits
from emloc.integrations.transformers.fitting_data import fitting
from emloc.integrations.transformers.loading import load_model
from emloc.integrations.transformers.new_head import with_new_head
from emloc.integrations.transformers.planned import PlannedTransformer
from emloc.integrations.transformers.quantizer import emulator_config
from emloc.integrations.transformers.sampling import TrainingData, drawn, in_batches
from emloc.integrations.transformers.skeleton import (
    empty_model,
    keep_no_keys,
    linears_within,
    repeated_blocks,
    shared_input_groups,
    shared_linears,
)
from emloc.integrations.transformers.text_options import counted_tokens, read_whole
from emloc.integrations.transformers.untying import untied_config
from emloc.integrations.transformers.vocabulary import vocabulary
from emloc.machine.memory import PeakMemory, return_large_blocks
from emloc.machine.remembered import Remembered

GROUPS: Remembered[Sequence[Sequence[str]]] = Remembered(64)
"""Groups of layers that were found in this process, by the classes of family and model, config and layers."""


class TransformersFamily(PlannedTransformer):
    """`ModelFamily` of one auto class; a subclass adds `name`, `example`, `loss` and `data`.

    Attributes:
        trainer_class: a subclass of transformers' Trainer that comes by the family's loss in a way of its
            own; None: by `loss`.
        new_head: ends of the names of modules that a checkpoint of another class may lack, such as
            `classifier`: they are drawn by a seed, and have to be trained whole (`lora_modules_to_save`).
    """

    name: str
    new_head: tuple[str, ...] = ()
    trainer_class: Any = None
    streams_training = True
    continues_adapters = True

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See `ModelFamily`."""
        raise NotImplementedError

    def data(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        """The data that the options name, read for this model, in their order."""
        raise NotImplementedError

    def native(self, checkpoint: Checkpoint) -> Checkpoint:
        """See `HasOtherLayouts`; a model of another class of transformers, where there is `new_head`."""
        if not self.new_head:
            return checkpoint
        return with_new_head(checkpoint, self.auto_class, self.new_head)

    def skeleton(self, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
        """See `ModelFamily`."""
        model = empty_model(checkpoint, self.auto_class, dtype)
        keep_no_keys(model)
        return model

    def stored(
        self, model: nn.Module, parameter: str, checkpoint: Checkpoint
    ) -> StoredParameter | None:
        """See `ModelFamily`."""
        return stored_parameter(model, parameter, checkpoint)

    def module_name(self, model: nn.Module, name: str) -> str:
        """See `KnowsOlderNames`."""
        return module_name(model, name)

    def untied_config(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any] | None:
        """See `UntiesWeights`."""
        return untied_config(checkpoint, model)

    def blocks(self, model: nn.Module) -> Sequence[str]:
        """See `ModelFamily`; of all towers, in the order of the model's modules."""
        return repeated_blocks(model)

    def forwards(self, model: nn.Module) -> Sequence[Callable[[Any], Any]]:
        """Calls of a bfloat16 copy of fake tensors that together run all layers once.

        By default one, on `example`.
        """

        def forward(fake: Any) -> None:
            inputs = self.example(fake.config, 1, 4)
            # A decoder behind an encoder may be given its tokens, or make them of the labels.
            told = any(name.startswith("decoder_") for name in inputs)
            learns = getattr(fake.config, "is_encoder_decoder", False) and not told
            fake(**{k: _halved(v) for k, v in inputs.items() if learns or k != "labels"})

        return [forward]

    def layer_groups(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """See `ModelFamily`; found out by tracing `forwards`, once for a config."""
        self._require_masks(model)
        layers = linears_within(model, self.blocks(model))
        config: Any = model.config
        same = (type(self), type(model), config.to_json_string(use_diff=False), *layers)
        groups = GROUPS.answer(
            same, lambda: shared_input_groups(model, layers, *self.forwards(model))
        )
        return [list(group) for group in groups]  # whoever changes theirs leaves the others' alone

    def kept_dense(self, model: nn.Module) -> Mapping[str, str]:
        """See `KeepsLayersDense`: linear layers of blocks are compressed where their weight is their own."""
        return shared_linears(model, self.blocks(model))

    def vocabulary(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """See `HasVocabulary`."""
        return vocabulary(model)

    def layers_in_few_bits(self, model: nn.Module, skip: Sequence[str] | None) -> Sequence[str]:
        """See `LoadsInFewBits`; `emloc.integrations.transformers.few_bits`."""
        return layers_in_few_bits(model, skip)

    def token_mask(self, batch: Batch, layer: str | None = None) -> Tensor | None:
        """See `MasksPadding`; by `attention_mask`, where there is one.

        A family of models with an encoder and a decoder has one of its own.
        """
        given = batch.get("attention_mask")
        mask = None if given is None else given.bool()
        return None if mask is None or (layer is not None and bool(mask.all())) else mask

    def calibration_tokens(self, options: CalibrationOptions) -> int | None:
        """See `CountsTokens`."""
        return counted_tokens(options)

    def read_whole(
        self, options: CalibrationOptions, length: int, elsewhere: bool
    ) -> Mapping[str, Any]:
        """See `ReadsWhole`."""
        return read_whole(options, length, elsewhere)

    def calibration_batches(
        self, checkpoint: Checkpoint, options: CalibrationOptions
    ) -> Sequence[Batch]:
        """See `ModelFamily`; so many samples of `data`, drawn by seed.

        Raises:
            ConfigError: they are to be counted in tokens.
        """
        self._refuse(options, "num_calibration_tokens")
        data = self._fitting(checkpoint, options)
        samples = drawn(data.samples, options.num_calibration_samples, options.seed)
        return [data.collate(part) for part in in_batches(samples, options.calibration_batch_size)]

    def emulator_config(self, checkpoint: Checkpoint, layers: EmulatorLayers) -> dict[str, Any]:
        """See `ModelFamily`."""
        return emulator_config(checkpoint, layers)

    def load(self, checkpoint: Checkpoint, dtype: str, device: str) -> nn.Module:
        """See `ModelFamily`."""
        return load_model(checkpoint, self.auto_class, dtype, device)

    def train(self, config: TrainConfig, work: Path) -> dict[str, Any]:
        """See `ModelFamily`; `emloc.integrations.transformers.loss_trainer`.

        Raises:
            ConfigError: an option asks for what `data` does not give.
        """
        from emloc.integrations.transformers.loss_trainer import TrainingWay, train_on

        return_large_blocks()
        with PeakMemory(config.device, mapped=not config.stream, limit=config.memory) as peak:
            checkpoint = self._opened(config.emulator or str(config.model_name_or_path))
            how = TrainingWay(self.task_type, self.frozen, self.trainer_class)
            data = self._fitting(checkpoint, config)
            self._refuse(config, "streaming")
            if not data.evaluation:
                self._refuse(config, "eval_dataset")
            figures = train_on(self, checkpoint, data, how, config, work)
        return {**figures, **peak.figures()}

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """See `Evaluates`; the mean loss, in `emloc.integrations.peft.evaluated_loss`.

        Raises:
            ConfigError: there are tasks, which only a family with scores of its own has.
        """
        from emloc.integrations.peft.evaluated_loss import evaluate_loss

        self._refuse(config, "tasks")
        checkpoint = self._opened(config.model_name_or_path)
        data = self._fitting(checkpoint, config)
        samples = data.samples[: config.num_samples]
        parts = in_batches(samples, config.per_device_eval_batch_size)
        return evaluate_loss(config, self, checkpoint, [data.collate(part) for part in parts])

    def _require_masks(self, model: Any) -> None:
        """Refuse the default mask, which is of one sequence, for a model that reads two."""
        two = getattr(model.config, "is_encoder_decoder", False)
        if two and type(self).token_mask is TransformersFamily.token_mask:
            raise PluginError(
                f"The family {self.name} has encoder-decoder models, whose layers read two sequences; give "
                f"it a token_mask that says which of the rows that each layer reads are real."
            )

    def _refuse(self, options: BaseModel, name: str) -> None:
        """Refuse an option of text that a subclass registers and the defaults here do not read."""
        if getattr(options, name, None):
            raise ConfigError(f"The family {self.name} does not read {name}; leave it out.")

    def _fitting(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        data = self.data(checkpoint, options)
        return fitting(data, lambda: self.skeleton(checkpoint, torch.float32))

    def _opened(self, name: str) -> Checkpoint:
        path = locate(name)
        family: ModelFamily = self
        return native_of(family, Checkpoint.open(path))


def _halved(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.is_floating_point() else tensor
