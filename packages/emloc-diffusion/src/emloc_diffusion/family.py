"""Diffusion models: the denoiser of a pipeline of diffusers, its linear layers and convolutions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.read_errors import reading
from emloc.config import (
    CalibrationOptions,
    CorrectConfig,
    DemoConfig,
    EvaluateConfig,
    TrainConfig,
)
from emloc.extend.family import Batch, EmulatorLayers, StoredParameter
from emloc.integrations.diffusers.few_bits import layers_in_few_bits
from emloc.integrations.diffusers.quantizer import emulator_config
from emloc.integrations.diffusers.skeleton import Trace, empty_model, is_layer, trace, units
from emloc.machine.remembered import Remembered
from emloc_diffusion.denoisers import DENOISERS, denoiser_of
from emloc_diffusion.denoising_loss import squared_errors
from emloc_diffusion.objective import objective_of
from emloc_diffusion.planned import PlannedDiffusion
from emloc_diffusion.samples import encode_samples

MODULATION = ("time_emb_proj", "linear", "emb_proj")
"""Layers within a block that read the timestep's embedding and not the picture."""

TRACES: Remembered[Trace] = Remembered(64)
"""Forwards that were traced in this process, by the model's class, config and parts."""


class DiffusionFamily(PlannedDiffusion):
    """`ModelFamily` for diffusion models."""

    name = "diffusion"
    streams_training = True
    continues_adapters = True
    adapter_formats: tuple[str, ...] = ("peft", "diffusers", "kohya")

    def skeleton(self, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
        """See `ModelFamily`."""
        return empty_model(checkpoint, denoiser_of(checkpoint).model_class, dtype)

    def stored(
        self, model: nn.Module, parameter: str, checkpoint: Checkpoint
    ) -> StoredParameter | None:
        """See `ModelFamily`; diffusers stores every parameter under its own name."""
        return StoredParameter((parameter,)) if parameter in checkpoint.tensors else None

    def blocks(self, model: nn.Module) -> Sequence[str]:
        """Resnets and transformer blocks, and the layers between them, in the order of the forward."""
        return self._trace(model).order

    def layer_groups(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """Linear layers of a block that read the same tensor form a group; a convolution is alone."""
        traced = self._trace(model)
        groups: dict[object, list[str]] = {}
        for block in traced.order:
            for name, module in model.get_submodule(block).named_modules(prefix=block):
                if not is_layer(module) or name.rpartition(".")[2] in MODULATION:
                    continue
                key = (block, traced.inputs[name]) if name in traced.inputs else name
                groups.setdefault(key if isinstance(module, nn.Linear) else name, []).append(name)
        return list(groups.values())

    def kept_dense(self, model: nn.Module) -> Mapping[str, str]:
        """Modulation, and the model's own ends."""
        compressed = {name for group in self.layer_groups(model) for name in group}
        blocks = self._trace(model).order
        return {
            name: "it reads the timestep alone"
            if any(name.startswith(f"{block}.") for block in blocks)
            else "it embeds pixels, time or text, or makes the output"
            for name, module in model.named_modules()
            if is_layer(module) and name not in compressed
        }

    def _trace(self, model: Any) -> Trace:
        known: Trace | None = getattr(model, "_emloc_trace", None)
        if known is None:
            within = units(model)
            layers = [n for n, m in model.named_modules() if n and is_layer(m)]
            inside = [n for n in layers if any(n.startswith(f"{unit}.") for unit in within)]
            between = [n for n in layers if n not in inside and _beside_a_list(model, n)]
            denoiser = DENOISERS[type(model).__name__]
            linear = [n for n in inside if isinstance(model.get_submodule(n), nn.Linear)]
            modules = [*within, *between]

            def traced() -> Trace:
                hint = "check that it is the model's own"
                with reading(
                    "The denoiser's config.json", "describes a model that does not run", hint
                ):
                    example = denoiser.example(model.config)
                    return trace(
                        model, modules, linear, lambda fake: denoiser.predict(fake, example)
                    )

            config = json.dumps(dict(model.config), sort_keys=True, default=str)
            known = TRACES.answer((type(model), config, *modules, "", *linear), traced)
            object.__setattr__(model, "_emloc_trace", known)
        return known

    def layers_in_few_bits(self, model: nn.Module, skip: Sequence[str] | None) -> Sequence[str]:
        """See `LoadsInFewBits`; `emloc.integrations.diffusers.few_bits`."""
        return layers_in_few_bits(model, skip)

    def calibration_batches(
        self, checkpoint: Checkpoint, options: CalibrationOptions
    ) -> Sequence[Batch]:
        """The pictures in turn, each time with other noise at another timestep, as training draws them."""
        # What a correction is chosen on sees the text encoders that training has changed.
        adapter = options.adapter if isinstance(options, CorrectConfig) else None
        samples = encode_samples(checkpoint.path, options, adapter=adapter)
        objective = objective_of(checkpoint.path)
        generator = torch.Generator().manual_seed(options.seed)
        count, size = options.num_calibration_samples, options.calibration_batch_size
        order = [i % len(samples.pictures) for i in range(count)]
        return [
            samples.batch(order[start : start + size], objective, generator)
            for start in range(0, count, size)
        ]

    def token_mask(self, batch: Batch, layer: str | None = None) -> Tensor | None:
        """Every latent counts, and every token of a prompt: the denoiser reads padding too."""
        if layer is not None:
            return None
        sample = batch["sample"]
        return torch.ones(sample.shape[0], *sample.shape[2:], dtype=torch.bool)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Squared error of the prediction, summed over latents' elements."""
        return squared_errors(model, batch).sum(), batch["target"].numel()

    def load(self, checkpoint: Checkpoint, dtype: str, device: str) -> nn.Module:
        """See `ModelFamily`; `emloc_diffusion.loading`."""
        from emloc_diffusion.loading import load_denoiser

        return load_denoiser(checkpoint, dtype, device)

    def emulator_config(self, checkpoint: Checkpoint, layers: EmulatorLayers) -> dict[str, Any]:
        """See `ModelFamily`."""
        return emulator_config(checkpoint.config, layers)

    def train(self, config: TrainConfig, work: Path) -> dict[str, Any]:
        """See `ModelFamily`; `emloc_diffusion.training`."""
        from emloc_diffusion.training import train_lora

        return train_lora(config, work, self)

    def export_adapter(self, checkpoint: Checkpoint, folder: Path) -> Sequence[str]:
        """`pytorch_lora_weights.safetensors` for diffusers and, of UNets, kohya's file.

        Neither can hold modules that were trained whole; of such an adapter there is PEFT's format alone.
        """
        from emloc_diffusion.export import export_adapter

        adapter = Adapter.open(str(folder))
        if adapter.saved or adapter.copies:
            return ()
        component = checkpoint.layout.folder.rstrip("/")
        return [path.name for path in export_adapter(folder, component)]

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """See `ModelFamily`; `emloc_diffusion.evaluation`."""
        from emloc_diffusion.evaluation import evaluate_model

        return evaluate_model(config, self)

    def demo(self, config: DemoConfig) -> Path:
        """See `ModelFamily`; `emloc_diffusion.demo`."""
        from emloc_diffusion.demo.demo import run_demo

        return run_demo(config)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """See `ModelFamily`; `emloc_diffusion.example`."""
        from emloc_diffusion.example import write_example

        return write_example(folder, seed)


def _beside_a_list(model: nn.Module, layer: str) -> bool:
    """Return whether a layer leads into or out of a list of blocks, such as an attention's projections;
    those of the model itself read pixels or timesteps and stay dense.
    """
    parent = layer.rpartition(".")[0]
    if not parent:
        return False
    return any(isinstance(child, nn.ModuleList) for child in model.get_submodule(parent).children())
