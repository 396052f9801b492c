"""The shape of the demo's base model: a small Stable Diffusion, every part of it diffusers' own.

Pictures of 32 × 32 pixels have latents of 8 × 8. The UNet has what the large ones have: residual
blocks of 3 × 3 convolutions, skips, self- and cross-attention. Weights are random; `base.py` trains them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from emloc_diffusion.example_pipelines import clip_tokenizer

PIXELS = 32
LATENT_CHANNELS = 4
# 77 in the large ones, most of it padding that every cross-attention reads.
TOKENS = 24


@dataclass(frozen=True)
class Shape:
    """Widths and depths of the three networks; the UNet's widths are multiples of 8.

    Attributes:
        vae_widths: of the autoencoder, from the pixels inward; each after the first halves the picture.
        widths: of the UNet; each after the first halves the latents.
        layers: residual blocks on each of the UNet's levels.
        text_width: of the text encoder, and of what the cross-attention reads.
        text_layers: depth of the text encoder.
    """

    vae_widths: tuple[int, ...] = (16, 32, 64)
    widths: tuple[int, ...] = (48, 96)
    layers: int = 1
    text_width: int = 64
    text_layers: int = 2


def small_pipeline(shape: Shape, words: Sequence[str]) -> Any:
    """`StableDiffusionPipeline` with random weights and one token for each of `words`."""
    tokenizer = clip_tokenizer(words=words)
    tokenizer.model_max_length = TOKENS
    return StableDiffusionPipeline(
        vae=_vae(shape),
        text_encoder=_text_encoder(shape, tokenizer),
        tokenizer=tokenizer,
        unet=_unet(shape),
        # The last step of training is noise alone, as what sampling starts from: latents this small
        # would otherwise tell the picture's background to the end.
        scheduler=DDIMScheduler(  # pyright: ignore[reportArgumentType]
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            prediction_type="v_prediction", rescale_betas_zero_snr=True,
            timestep_spacing="trailing", steps_offset=1, clip_sample=False,
        ),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )  # fmt: skip


def _vae(shape: Shape) -> Any:
    levels = len(shape.vae_widths)
    config: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": shape.vae_widths, "layers_per_block": 1,
        "mid_block_add_attention": False,
        # One group: a norm per channel or two would wipe out how strong a flat colour is.
        "norm_num_groups": 1,
        "latent_channels": LATENT_CHANNELS, "sample_size": PIXELS,
    }  # fmt: skip
    model: Any = AutoencoderKL(**config)
    # Signals keep their strength and pass each residual block nearly unchanged: many times faster to
    # train than from the usual initial weights. Latents start almost certain: unit noise over what is
    # not yet a signal would hide it.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = 0.1 if name.endswith("conv2.weight") else 1.0
                parameter.normal_(0, scale * parameter[0].numel() ** -0.5)
        model.quant_conv.bias[LATENT_CHANNELS:].fill_(-5.0)
    return model


def _unet(shape: Shape) -> UNet2DConditionModel:
    levels = len(shape.widths)
    return UNet2DConditionModel(
        sample_size=PIXELS // 2 ** (len(shape.vae_widths) - 1),
        in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=shape.widths, layers_per_block=shape.layers, norm_num_groups=8,
        attention_head_dim=4,  # diffusers reads it as the number of heads
        cross_attention_dim=shape.text_width,
    )  # fmt: skip


def _text_encoder(shape: Shape, tokenizer: Any) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=shape.text_width,
        intermediate_size=4 * shape.text_width, projection_dim=shape.text_width,
        num_hidden_layers=shape.text_layers, num_attention_heads=4,
        max_position_embeddings=TOKENS, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = CLIPTextModel(config)
    # The usual initial 0.02 is for wide models; at this width words would look alike.
    for name, parameter in model.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model
