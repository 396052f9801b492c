"""A tiny random InternVL and data set on disk, for trying a stage and for the contract tests."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.integrations.transformers.lively_model import lively_model
from emloc_vlm.image_only import image_only
from emloc_vlm.internvl_chat import CHAT_TEMPLATE, IMAGE_TOKENS

# Sizes are all different, so that a transposed product cannot go unnoticed.
TEXT: Mapping[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
VISION: Mapping[str, Any] = {
    "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 5,
    "image_size": [16, 16], "patch_size": [4, 4], "attention_bias": True,
}  # fmt: skip
COLORS: Mapping[str, str] = {"red": "#d02020", "green": "#20a030", "blue": "#2040d0"}


def example_processor(image_size: int, image_seq_length: int, max_patches: int = 3) -> Any:
    """InternVL's processor on the byte tokenizer."""
    return image_only(InternVLProcessor)(
        image_processor=GotOcr2ImageProcessorPil(
            size={"height": image_size, "width": image_size}, crop_to_patches=True, min_patches=1,
            max_patches=max_patches,
        ),
        tokenizer=byte_tokenizer(**IMAGE_TOKENS),
        image_seq_length=image_seq_length,
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def write_model(
    folder: Path,
    text_type: str = "qwen2",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
) -> Path:
    """Save a random InternVL whose language model is of `text_type`."""
    processor = example_processor(16, 4)
    tokenizer = processor.tokenizer
    config = InternVLConfig(
        text_config={
            "model_type": text_type, **TEXT, "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None, **(text or {}),
        },
        vision_config={**VISION, **(vision or {})},
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
    )  # fmt: skip
    model = lively_model(AutoModelForImageTextToText, config, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Chats that ask for a square's colour, as JSONL, with images of differing shapes beside it."""
    draw = random.Random(seed)
    lines: list[str] = []
    for index in range(count):
        color = draw.choice(list(COLORS))
        size = draw.choice([(16, 16), (34, 15), (15, 40)])  # one tile, or two and a thumbnail
        picture = Image.new("RGB", size, "#f0f0f0")
        ImageDraw.Draw(picture).rectangle((2, 2, 11, 11), fill=COLORS[color])
        name = f"{path.stem}-{index:03d}.png"
        picture.save(path.parent / name)
        question = [{"type": "image", "image": name}, {"type": "text", "text": "Colour?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": color}]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_example(folder: Path, seed: int) -> Mapping[str, Any]:
    """See `ModelFamily.write_example`."""
    model = write_model(folder / "model", seed=seed)
    data = write_rows(folder / "train.jsonl", 24, seed)
    return {"model_name_or_path": str(model), "dataset": str(data), "max_length": 96}
