"""The planner's view of diffusion models (`PlannedFamily`)."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.artefacts.json_files import read_json
from emloc.artefacts.schema import Schema, Size, conforming
from emloc.errors import ConfigError
from emloc.extend.family import Batch
from emloc.integrations.diffusers.skeleton import empty_model, is_layer
from emloc.integrations.peft.blocks import in_chosen_blocks
from emloc.planning.described import weight_dtype
from emloc.planning.family import Groups, OtherModel
from emloc.planning.operations import Layer
from emloc.planning.step import StepOptions, StepSizes
from emloc_diffusion.denoisers import denoiser_of

PROMPT_TOKENS = {
    "UNet2DConditionModel": 77,
    "SD3Transformer2DModel": 77 + 256,
    "FluxTransformer2DModel": 512,
}
"""Prompt lengths of the stock pipelines' text encoders."""

STACKS = ("num_layers", "num_single_layers")
"""Config keys of transformers that count equal blocks."""

VAE_SHRINKS_BY = 8
"""Pixels per latent and side, where the VAE's config is not at hand."""


class _TextEncoder(Schema):
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 20)]


class _Vae(Schema):
    block_out_channels: Annotated[list[Size], Field(min_length=1, max_length=16)]


class PlannedDiffusion:
    """`PlannedFamily` for diffusion models."""

    def planned_batch(self, checkpoint: Checkpoint, options: Any, samples: int) -> Batch:
        """Noisy latents of so many pictures, and with prior preservation as many of the class.

        Raises:
            ConfigError: the resolution does not fit the model.
        """
        name = str(checkpoint.config["_class_name"])
        count = samples * (2 if options.class_data_dir else 1)
        shrink = _vae_shrinks_by(checkpoint)
        side = options.resolution // shrink
        example = denoiser_of(checkpoint).example(_complete(checkpoint))
        channels, width = example["sample"].shape[1], example["encoder_hidden_states"].shape[-1]
        step = shrink * (2 if "Transformer" in name else 1)
        if options.resolution % step:
            raise ConfigError(
                f"resolution={options.resolution} does not fit {checkpoint.name}; use a multiple of "
                f"{step}."
            )
        kind = _dtype(checkpoint, options.dtype)

        def empty(*size: int) -> Tensor:
            return torch.empty(*size, dtype=kind, device="meta")

        latents = (count, channels, side, side)
        return {
            "sample": empty(*latents),
            "target": empty(*latents),
            "timestep": empty(count),
            "encoder_hidden_states": empty(count, _prompt_tokens(checkpoint), width),
            "pooled": empty(count, example["pooled"].shape[-1]),
            "time_ids": empty(count, 6),
        }

    def adapted_layers(self, model: nn.Module, options: Any) -> Sequence[str]:
        """Names as given; for `all-linear` those that are compressed, convolutions if asked."""
        kinds = (nn.Linear, nn.Conv2d) if getattr(options, "lora_conv", False) else (nn.Linear,)
        wanted = options.lora_target_modules
        if wanted == ["all-linear"]:
            groups = cast(Any, self).layer_groups(model)
            names = [name for group in groups for name in group]
            names = [name for name in names if isinstance(model.get_submodule(name), kinds)]
        else:
            names = [
                name
                for name, module in model.named_modules()
                if is_layer(module) and any(name == t or name.endswith(f".{t}") for t in wanted)
            ]
        return in_chosen_blocks(model, names, options)

    def stacks(self, checkpoint: Checkpoint) -> Sequence[int]:
        """The blocks of transformers by kind; a UNet's differ all."""
        complete = _complete(checkpoint)
        if "UNet" in str(checkpoint.config["_class_name"]):
            return []
        return [int(complete[key]) for key in STACKS if key in complete]

    def shallow(self, checkpoint: Checkpoint, blocks: Sequence[int]) -> Checkpoint:
        """See `PlannedFamily`."""
        assert isinstance(checkpoint, Described)
        keys = [key for key in STACKS if key in _complete(checkpoint)]
        return checkpoint.having({**checkpoint.config, **dict(zip(keys, blocks))})

    def trainable(self, checkpoint: Checkpoint, groups: Groups, options: Any) -> nn.Module:
        """See `PlannedFamily`."""
        from emloc.integrations.diffusers.quantizer import replace_layers
        from emloc.integrations.peft.planned import with_planned_lora

        kind = _dtype(checkpoint, options.dtype)
        model: Any = empty_model(checkpoint, denoiser_of(checkpoint).model_class, kind)
        targets = list(self.adapted_layers(model, options))
        replace_layers(model, [group.as_json() for group in groups])
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        chosen = {"lora_layers_to_transform": [], "lora_layers_pattern": []}  # taken in already
        options = options.model_copy(update={"lora_target_modules": targets, **chosen})
        return with_planned_lora(model.requires_grad_(False), options)

    def step_sizes(
        self, model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
    ) -> StepSizes | None:
        """See `PlannedFamily`; `emloc_diffusion.activations`."""
        from emloc_diffusion.activations import step_sizes

        return step_sizes(model, layers, batch, options)

    def cache_elements(self, model: nn.Module, options: Any) -> int:
        """Nothing: a picture has no past."""
        return 0

    def other_models(self, checkpoint: Checkpoint, options: Any) -> Mapping[str, OtherModel]:
        """VAE and text encoders, in float32 as our stages run them."""
        from emloc_diffusion.companions import companions

        return companions(checkpoint.path, options.resolution)


def _complete(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The config with the class's defaults for what it does not say."""
    parameters = inspect.signature(denoiser_of(checkpoint).model_class.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {**defaults, **checkpoint.config}


def _dtype(checkpoint: Checkpoint, wanted: str) -> torch.dtype:
    if wanted != "auto":
        return getattr(torch, wanted)
    stored = next(iter(checkpoint.tensors.values()), None)
    return stored.dtype if stored else weight_dtype(checkpoint, 0)


def _prompt_tokens(checkpoint: Checkpoint) -> int:
    """The prompt length of a UNet's text encoder, where its config is at hand; else of the stock
    pipelines.
    """
    name = str(checkpoint.config["_class_name"])
    for folder in (checkpoint.path, checkpoint.path.parent):
        if "UNet" in name and (folder / "text_encoder" / "config.json").is_file():
            path = folder / "text_encoder" / "config.json"
            return conforming(_TextEncoder, read_json(path), path).max_position_embeddings
    return PROMPT_TOKENS[name]


def _vae_shrinks_by(checkpoint: Checkpoint) -> int:
    for folder in (checkpoint.path, checkpoint.path.parent):
        if (folder / "vae" / "config.json").is_file():
            path = folder / "vae" / "config.json"
            return 2 ** (len(conforming(_Vae, read_json(path), path).block_out_channels) - 1)
    return VAE_SHRINKS_BY
