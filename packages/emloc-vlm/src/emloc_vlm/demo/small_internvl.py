"""The shape of the demo's base model: a small InternVL and its processor, both transformers' own.

One tile per picture, one token per word. Weights are random; `base.py` trains them.
"""

import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    InternVLProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from emloc_vlm.image_only import image_only
from emloc_vlm.internvl_chat import CHAT_TEMPLATE, IMAGE_TOKENS

PIXELS = 64
PATCH = 8
IMAGE_TOKENS_PER_TILE = (PIXELS // PATCH // 2) ** 2


@dataclass(frozen=True)
class Shape:
    """Widths and depths of the two towers."""

    vision_width: int = 96
    vision_layers: int = 3
    width: int = 128
    layers: int = 3


def small_processor(texts: Iterable[str]) -> Any:
    """One token per word of `texts`; other words are spelt."""
    words = sorted({word for text in texts for word in text.replace("?", " ?").split()})
    tokens = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS.values()]
    letters = [c for c in string.printable if not c.isspace()]
    spelt = [*letters, *(f"##{c}" for c in letters)]
    known = dict.fromkeys([*tokens, "\n", "user", "assistant", *words, *spelt])
    vocabulary = {word: index for index, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<|unk|>"))
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    # Words, marks and line ends; blanks between them are not tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        **IMAGE_TOKENS,
    )
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return image_only(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": PIXELS, "width": PIXELS}, crop_to_patches=True, min_patches=1,
            max_patches=1,
            # The pictures are nearly white: what differs from that should be what stands out.
            image_mean=[0.95] * 3, image_std=[0.2] * 3,
        ),
        tokenizer=fast,
        image_seq_length=IMAGE_TOKENS_PER_TILE,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def small_model(shape: Shape, processor: Any) -> Any:
    """`InternVLForConditionalGeneration` with a Qwen2, random weights."""
    tokenizer = processor.tokenizer
    config = InternVLConfig(
        vision_config={
            "hidden_size": shape.vision_width, "intermediate_size": 4 * shape.vision_width,
            "num_hidden_layers": shape.vision_layers, "num_attention_heads": 4,
            "image_size": [PIXELS, PIXELS], "patch_size": [PATCH, PATCH], "attention_bias": True,
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2", "hidden_size": shape.width,
            "intermediate_size": 3 * shape.width, "num_hidden_layers": shape.layers,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer),
            "max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        },
        image_token_id=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS_PER_TILE,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    # transformers' usual initial 0.02 is for wide models; at this width signals would fade.
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "position_embeddings" in name or "cls_token" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # seen from the first step
        elif parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model
