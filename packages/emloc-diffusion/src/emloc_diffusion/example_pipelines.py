"""Tiny random diffusers pipelines on disk, for trying a stage and for tests; nothing is downloaded.

Each kind has the classes, schedulers and scaling constants of the published models of its kind: `sd` of
Stable Diffusion 1.5, `sdxl` of Stable Diffusion XL, `sd3` of Stable Diffusion 3, `flux` of FLUX.1-dev.
Only the widths and depths are small. A picture of 64 × 64 pixels has latents of 8 × 8.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

# Widths are all different, so that a transposed product or swapped encoder cannot go unnoticed.
CLIP_WIDTH = 20
CLIP_2_WIDTH = 28
CLIP_2_POOLED = 24
T5_WIDTH = 56
CHANNELS_UNET = 4
CHANNELS_TRANSFORMER = 8
RESOLUTION = 64

NOISE: Mapping[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1,
}  # fmt: skip
UNET: Mapping[str, Any] = {
    "sample_size": 8, "in_channels": CHANNELS_UNET, "out_channels": CHANNELS_UNET,
    "layers_per_block": 1, "block_out_channels": (24, 40), "norm_num_groups": 8,
    "attention_head_dim": 4,
}  # fmt: skip


def write_pipeline(
    folder: Path,
    kind: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **unet_overrides: Any,
) -> Path:
    """Save a random pipeline that `DiffusionPipeline.from_pretrained` loads.

    Args:
        folder: where to; made when missing.
        kind: `sd`, `sdxl`, `sd3` or `flux`.
        seed: of all weights; the caller's random state is left as it was.
        dtype: of all weights.
        unet_overrides: options of the denoiser's configuration, be it a UNet or a transformer; text encoders
            and VAE become as wide as it reads.

    Raises:
        KeyError: no such kind.
    """
    make = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = make(unet_overrides)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)  # all of it: diffusers' own warns of what it might keep
    pipeline.save_pretrained(folder)
    return Path(folder)


def clip_tokenizer(pad_token: str = "<|endoftext|>", words: Sequence[str] = ()) -> CLIPTokenizer:
    """CLIP's tokenizer with one token per byte, and one for each of `words` (lower case)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in words:  # letter by letter from the left
        start = word[0]
        for letter in [*word[1:-1], f"{word[-1]}</w>"]:
            merges.append((start, letter))
            start += letter
            tokens.append(start)
    unique = dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"])
    vocabulary = {token: index for index, token in enumerate(unique)}
    return CLIPTokenizer(
        vocab=vocabulary,
        merges=list(dict.fromkeys(merges)),  # pyright: ignore[reportArgumentType]
        pad_token=pad_token,
        model_max_length=77,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """T5's tokenizer with one token per letter."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def _clip(tokenizer: Any, width: int, pooled: int, projected: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width + 4,
        projection_dim=pooled, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return _lively(CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config))


def _t5(tokenizer: Any, width: int = T5_WIDTH) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=12, d_ff=72, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()  # its own initial weights are of unit variance


def _vae(latent_channels: int, **more: Any) -> AutoencoderKL:
    shape: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (8, 8, 12, 16), "norm_num_groups": 4, "layers_per_block": 1,
        "latent_channels": latent_channels, "sample_size": RESOLUTION,
    }  # fmt: skip
    return _lively(AutoencoderKL(**shape, **more))


def _lively(model: Any) -> Any:
    """Larger than the usual initial weights, so that differences between inputs show in the outputs."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
    return model.eval()


def _stable_diffusion(overrides: Mapping[str, Any]) -> Any:
    tokenizer = clip_tokenizer()
    width = int(overrides.get("cross_attention_dim", CLIP_WIDTH))
    shape: dict[str, Any] = {
        **UNET, "cross_attention_dim": width,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return StableDiffusionPipeline(
        vae=_vae(CHANNELS_UNET, scaling_factor=0.18215),
        text_encoder=_clip(tokenizer, width, width, False),
        tokenizer=tokenizer,
        unet=_lively(UNet2DConditionModel(**{**shape, **overrides})),
        scheduler=cast(Any, PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False)),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def _stable_diffusion_xl(overrides: Mapping[str, Any]) -> Any:
    tokenizer, tokenizer_2 = clip_tokenizer(), clip_tokenizer(pad_token="!")
    read = int(overrides.get("cross_attention_dim", CLIP_WIDTH + CLIP_2_WIDTH))
    width = read - CLIP_2_WIDTH  # of the first text encoder; the second's is fixed
    ids = 6 * int(overrides.get("addition_time_embed_dim", 8))
    pooled = int(overrides.get("projection_class_embeddings_input_dim", CLIP_2_POOLED + ids)) - ids
    shape: dict[str, Any] = {
        **UNET, "cross_attention_dim": read,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled + ids,
    }  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_vae(CHANNELS_UNET, scaling_factor=0.13025, force_upcast=True),
        text_encoder=_clip(tokenizer, width, width, False),
        text_encoder_2=_clip(tokenizer_2, CLIP_2_WIDTH, pooled, True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=_lively(UNet2DConditionModel(**{**shape, **overrides})),
        scheduler=cast(Any, EulerDiscreteScheduler(**NOISE, timestep_spacing="leading")),
        add_watermarker=False,
    )


def _stable_diffusion_3(overrides: Mapping[str, Any]) -> Any:
    tokenizer, tokenizer_2, tokenizer_3 = clip_tokenizer(), clip_tokenizer("!"), t5_tokenizer()
    shape: dict[str, Any] = {
        "sample_size": 8, "patch_size": 2, "in_channels": CHANNELS_TRANSFORMER,
        "out_channels": CHANNELS_TRANSFORMER, "num_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": T5_WIDTH, "caption_projection_dim": 48,
        "pooled_projection_dim": CLIP_WIDTH + CLIP_2_POOLED, "pos_embed_max_size": 16,
    }  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=_lively(SD3Transformer2DModel(**{**shape, **overrides})),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(
            CHANNELS_TRANSFORMER, scaling_factor=1.5305, shift_factor=0.0609,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=_clip(tokenizer, CLIP_WIDTH, CLIP_WIDTH, True),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer_2, CLIP_2_WIDTH, CLIP_2_POOLED, True),
        tokenizer_2=tokenizer_2,
        text_encoder_3=_t5(tokenizer_3),
        tokenizer_3=tokenizer_3,
    )  # fmt: skip


def _flux(overrides: Mapping[str, Any]) -> Any:
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    shape: dict[str, Any] = {
        "patch_size": 1, "in_channels": 4 * CHANNELS_TRANSFORMER, "num_layers": 2,
        "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3,
        "joint_attention_dim": T5_WIDTH, "pooled_projection_dim": CLIP_WIDTH,
        "guidance_embeds": True, "axes_dims_rope": (4, 6, 6), **overrides,
    }  # fmt: skip
    pooled = int(shape["pooled_projection_dim"])
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=4096,
        ),
        vae=_vae(
            int(shape["in_channels"]) // 4, scaling_factor=0.3611, shift_factor=0.1159,
            use_quant_conv=False, use_post_quant_conv=False,
        ),
        text_encoder=_clip(tokenizer, pooled, pooled, False),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer_2, int(shape["joint_attention_dim"])),
        tokenizer_2=tokenizer_2,
        transformer=_lively(FluxTransformer2DModel(**shape)),
    )  # fmt: skip


KINDS: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "sd": _stable_diffusion,
    "sdxl": _stable_diffusion_xl,
    "sd3": _stable_diffusion_3,
    "flux": _flux,
}
