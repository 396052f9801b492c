"""A family in torch alone: all that `ModelFamily` requires and little else, as an example and for tests.

It needs no transformers, no PEFT and no plugin's package, so that the core can be tested by itself. Of the
capabilities it has an example of its kind and a loss to score models by; for all others core's defaults
hold: nothing is padding, checkpoints have one layout, the memory of its training steps is not counted.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.artefacts.small_files import write_json
from emloc.config import CalibrationOptions, EvaluateConfig, TrainConfig
from emloc.errors import CheckpointError, ConfigError
from emloc.extend.emulated_layers import quantization_config, refuse_missing, replace_layers
from emloc.extend.family import Batch, EmulatorLayers, StoredParameter
from emloc.extend.losses import loss_sum, summed
from emloc.formats.layer_format import DenseLayer
from emloc.linalg.convolution import matrix_shape
from emloc.machine.memory import PeakMemory
from emloc.options.marks import without_effect
from emloc.testing.toy_data import (
    drawn_batches,
    on_device,
    read_pictures,
    rows_in_batches,
    training_batches,
    write_pictures,
)
from emloc.testing.toy_lora import add_lora, fit_lora, put_lora, save_lora
from emloc.testing.toy_model import ToyModel, ToySizes, random_toy

TRAINING = {
    "emulator", "model_name_or_path", "output_dir", "family", "memory", "dataset", "dtype", "seed",
    "per_device_train_batch_size", "learning_rate", "max_steps", "num_train_epochs", "lora_r",
    "lora_alpha", "lora_target_modules", "use_rslora",
}  # fmt: skip
"""Options that training obeys; others would be ignored in silence, and are refused."""


class ToyFamily:
    """`ModelFamily` of `ToyModel`."""

    name = "toy"

    def skeleton(self, checkpoint: Checkpoint, dtype: torch.dtype) -> ToyModel:
        """See `ModelFamily`."""
        with torch.device("meta"):
            return ToyModel(ToySizes.of_config(checkpoint.config)).to(dtype).eval()

    def stored(
        self, model: nn.Module, parameter: str, checkpoint: Checkpoint
    ) -> StoredParameter | None:
        """See `ModelFamily`; every parameter is stored under its own name."""
        return StoredParameter((parameter,)) if parameter in checkpoint.tensors else None

    def blocks(self, model: nn.Module) -> Sequence[str]:
        """See `ModelFamily`."""
        assert isinstance(model, ToyModel)
        return [f"blocks.{index}" for index in range(len(model.blocks))]

    def layer_groups(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """See `ModelFamily`; `gate` and `up` of a block read the same."""
        groups = (["conv"], ["gate", "up"], ["down"])
        return [[f"{block}.{n}" for n in group] for block in self.blocks(model) for group in groups]

    def calibration_batches(
        self, checkpoint: Checkpoint, options: CalibrationOptions
    ) -> Sequence[Batch]:
        """See `ModelFamily`."""
        return drawn_batches(options)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See `ModelFamily`; cross-entropy of the classes."""
        scores = model(batch["pictures"].to(model.get_parameter("head.weight").dtype))
        high = torch.promote_types(scores.dtype, torch.float32)
        return cross_entropy(scores.to(high), batch["labels"], reduction="sum"), len(scores)

    def load(self, checkpoint: Checkpoint, dtype: str, device: str) -> ToyModel:
        """See `ModelFamily`."""
        stored = checkpoint.tensors["head.weight"].dtype  # a layer that no emulator compresses
        model = self.skeleton(checkpoint, stored if dtype == "auto" else getattr(torch, dtype))
        groups = checkpoint.config.get("quantization_config", {}).get("groups", [])
        replace_layers(model, groups, _dense_layer, "linear layer or convolution")
        wanted = model.state_dict()
        tensors = {
            name: checkpoint.read(name).to(device, wanted[name].dtype, copy=True)
            for name in wanted.keys() & checkpoint.tensors.keys()
        }
        missing = sorted(wanted.keys() - tensors.keys())
        refuse_missing(model, missing)
        if missing:
            raise CheckpointError(f"{checkpoint.name} holds no {missing[0]}; write it again.")
        try:
            model.load_state_dict(tensors, assign=True)
        except RuntimeError as problem:
            raise CheckpointError(
                f"{checkpoint.name}: its weights have not the shapes of its config; write it again."
            ) from problem
        return model.to(device)

    def emulator_config(self, checkpoint: Checkpoint, layers: EmulatorLayers) -> dict[str, Any]:
        """See `ModelFamily`."""
        return {**checkpoint.config, "quantization_config": quantization_config(layers.groups)}

    def train(self, config: TrainConfig, work: Path) -> dict[str, Any]:
        """See `ModelFamily`; on every layer that can be compressed, unless `lora_target_modules` says.

        Raises:
            ConfigError: an option is set that this training does not obey.
        """
        unread = config.model_fields_set - TRAINING - without_effect(type(config))
        if unread:
            raise ConfigError(f"The family toy does not read {min(unread)}; leave it out.")
        with PeakMemory(config.device, mapped=True, limit=config.memory) as peak:
            checkpoint = Checkpoint.open(locate(config.emulator or str(config.model_name_or_path)))
            model = self.load(checkpoint, config.dtype, config.device)
            layers = [name for group in self.layer_groups(model) for name in group]
            torch.manual_seed(config.seed)
            loras = add_lora(model, layers, config)
            seconds = fit_lora(model, loras, self.loss, training_batches(config), config)
            save_lora(loras, config, work)
            held = sum(p.numel() * p.element_size() for p in model.parameters())
        return {
            "seconds_per_step": seconds,
            "summary": {"train_weight_bytes": held},
            **peak.figures(),
        }

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """See `Evaluates`; the mean loss over the data in their order."""
        with PeakMemory(config.device, mapped=True) as peak:
            checkpoint = Checkpoint.open(locate(config.model_name_or_path))
            model = self.load(checkpoint, config.dtype, config.device)
            if config.adapter is not None:
                put_lora(model, Adapter.open(config.adapter))
            pictures = read_pictures(config)
            batches = rows_in_batches(
                pictures, config.num_samples, config.per_device_eval_batch_size
            )
            with torch.no_grad():
                parts = [loss_sum(self, model, on_device(b, config.device)) for b in batches]
            loss = summed(parts).mean(f"Data set {config.dataset}")
        return {"loss": loss, "samples": sum(part.terms for part in parts), **peak.figures()}

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """See `WritesExample`."""
        sizes = ToySizes()
        model = write_toy(folder / "model", sizes, seed)
        write_pictures(folder / "pictures.safetensors", sizes, 24, seed)
        return {"model_name_or_path": str(model), "dataset": str(folder / "pictures.safetensors")}


def write_toy(folder: Path, sizes: ToySizes, seed: int) -> Path:
    """Save a random toy model as a checkpoint: `config.json` and safetensors; returns its folder."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", sizes.as_config())
    save_file(random_toy(sizes, seed).state_dict(), folder / "model.safetensors")
    return folder


def _dense_layer(name: str, module: nn.Module) -> DenseLayer | None:
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return None
    weight, bias = module.weight, module.bias is not None
    d_out, d_in = matrix_shape(weight.shape)
    convolution = module if isinstance(module, nn.Conv2d) else None
    return DenseLayer(name, d_in, d_out, bias, weight.dtype, weight.device, convolution)
