"""Tiny random encoders as the libraries save them: a ViT for DINO and a CLIP, and pictures for them."""

import json

import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    ViTConfig,
    ViTModel,
)

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 24, 3, 3


def picture(seed, size=(48, 40), mode="RGB"):
    noise = torch.randint(0, 256, (6, 5, 3), generator=torch.Generator().manual_seed(seed))
    small = Image.fromarray(noise.to(torch.uint8).numpy())
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def lively(model):
    """The same weights each time, large enough for pictures to differ in their embeddings."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            elif parameter.ndim:
                parameter.copy_(1 + 0.3 * noise)
    return model.eval()


def vit():
    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, image_size=SIDE, patch_size=PATCH, layer_norm_eps=1e-6,  # timm's
    )  # fmt: skip
    return lively(ViTModel(config, add_pooling_layer=False))


def write_dino(folder):
    vit().save_pretrained(folder)
    return folder


def write_clip(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{a}</w>" for a in alphabet), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=[],
        model_max_length=24,
    )
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=20, intermediate_size=44, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=28, intermediate_size=60, num_hidden_layers=2, num_attention_heads=4,
        image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=18)
    lively(CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_old_image_config(folder)
    return folder


def write_old_image_config(folder):
    """As OpenAI's repository has it, with bare numbers for the sizes."""
    content = {
        "feature_extractor_type": "CLIPFeatureExtractor", "crop_size": SIDE, "size": SIDE,
        "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
