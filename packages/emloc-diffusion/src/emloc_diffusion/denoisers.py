"""Calls of each denoiser of diffusers, on one micro-batch of noisy latents and conditions.

A micro-batch holds `sample` (noisy latents, samples × channels × height × width), `timestep` (samples,
0 to 1000), `target` (as `sample`) and, per prompt, `encoder_hidden_states` (samples × tokens × width);
where the pipeline has them also `pooled` (samples × width) and `time_ids` (samples × 6, SDXL's sizes).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers import UNet2DConditionModel as UNet
from torch import Tensor

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError
from emloc.extend.family import Batch

Predict = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Denoiser:
    """One class of diffusers.

    Attributes:
        model_class: with `from_config` and `from_pretrained`.
        predict: the model's output for a micro-batch, in the shape of `sample`.
        example: a tiny micro-batch for a config, to trace a forward.
    """

    model_class: Any
    predict: Predict
    example: Callable[[Mapping[str, Any]], dict[str, Tensor]]


def denoiser_of(checkpoint: Checkpoint) -> Denoiser:
    """Find the denoiser by the config's `_class_name`.

    Raises:
        CheckpointError: a class that is not known here.
    """
    name = str(checkpoint.config.get("_class_name"))
    if name not in DENOISERS:
        raise CheckpointError(
            f"{checkpoint.name}: its denoiser is a {name}; supported: {', '.join(DENOISERS)}."
        )
    return DENOISERS[name]


def _unet(model: Any, batch: Batch) -> Tensor:
    added = None
    if model.config.addition_embed_type == "text_time":
        added = {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]}
    return model(
        batch["sample"],
        batch["timestep"],
        batch["encoder_hidden_states"],
        added_cond_kwargs=added,
    ).sample


def _sd3(model: Any, batch: Batch) -> Tensor:
    return model(
        hidden_states=batch["sample"],
        timestep=batch["timestep"],
        encoder_hidden_states=batch["encoder_hidden_states"],
        pooled_projections=batch["pooled"],
    ).sample


GUIDANCE = 1.0
"""The guidance that guidance-distilled FLUX is given while it is trained, as in diffusers' scripts."""


def _flux(model: Any, batch: Batch) -> Tensor:
    sample = batch["sample"]
    count, channels, height, width = sample.shape
    packed = FluxPipeline._pack_latents(sample, count, channels, height, width)  # pyright: ignore
    image_ids = FluxPipeline._prepare_latent_image_ids(  # pyright: ignore
        count, height // 2, width // 2, sample.device, sample.dtype
    )
    text_ids = sample.new_zeros(batch["encoder_hidden_states"].shape[1], 3)
    guidance = sample.new_full((count,), GUIDANCE) if model.config.guidance_embeds else None
    predicted = model(
        hidden_states=packed,
        timestep=batch["timestep"] / 1000,
        guidance=guidance,
        pooled_projections=batch["pooled"],
        encoder_hidden_states=batch["encoder_hidden_states"],
        txt_ids=text_ids,
        img_ids=image_ids,
    ).sample
    parts = predicted.view(count, height // 2, width // 2, channels, 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(sample.shape)


def _example(channels: int, size: int, tokens: int, width: int, pooled: int) -> dict[str, Tensor]:
    sample = torch.zeros(1, channels, size, size)
    return {
        "sample": sample,
        "target": sample,
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, tokens, width),
        "pooled": torch.zeros(1, pooled),
        "time_ids": torch.zeros(1, 6),
    }


def _example_unet(config: Mapping[str, Any]) -> dict[str, Tensor]:
    width = config["cross_attention_dim"]
    width = width if isinstance(width, int) else max(width)
    size = 2 ** len(config["block_out_channels"])
    inputs = config.get("projection_class_embeddings_input_dim") or 0
    pooled = inputs - 6 * (config.get("addition_time_embed_dim") or 0)
    return _example(config["in_channels"], size, 3, width, max(0, pooled))


def _example_transformer(channels: int) -> Callable[[Mapping[str, Any]], dict[str, Tensor]]:
    def make(config: Mapping[str, Any]) -> dict[str, Tensor]:
        pooled, width = config["pooled_projection_dim"], config["joint_attention_dim"]
        return _example(config["in_channels"] // channels, 4, 3, width, pooled)

    return make


DENOISERS: Mapping[str, Denoiser] = {
    "UNet2DConditionModel": Denoiser(UNet, _unet, _example_unet),
    "SD3Transformer2DModel": Denoiser(SD3Transformer2DModel, _sd3, _example_transformer(1)),
    "FluxTransformer2DModel": Denoiser(FluxTransformer2DModel, _flux, _example_transformer(4)),
}
