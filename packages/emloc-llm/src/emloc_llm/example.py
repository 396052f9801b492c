"""A tiny random language model and data set on disk, for trying a stage and for the contract tests."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer
from emloc.integrations.transformers.lively_model import lively_model

# Sizes are all different, so that a transposed product cannot go unnoticed.
SIZES: Mapping[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


def write_model(
    folder: Path,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a random model of a transformers architecture with the byte tokenizer."""
    tokenizer = byte_tokenizer()
    settings = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **overrides,
    }
    config = AutoConfig.for_model(model_type, **settings)
    model = lively_model(AutoModelForCausalLM, config, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Chats that ask for a word backwards, as JSONL."""
    draw = random.Random(seed)
    lines: list[str] = []
    for _ in range(count):
        word = "".join(draw.choice("abcdef") for _ in range(draw.randint(3, 9)))
        turns = [("user", f"Reverse {word}."), ("assistant", word[::-1])]
        messages = [{"role": role, "content": content} for role, content in turns]
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_example(folder: Path, seed: int) -> Mapping[str, Any]:
    """See `ModelFamily.write_example`."""
    model = write_model(folder / "model", seed=seed)
    data = write_rows(folder / "train.jsonl", 24, seed)
    return {"model_name_or_path": str(model), "dataset": str(data), "max_length": 96}
