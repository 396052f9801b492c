"""A tiny random model and data, for tests: words, by the letter that they begin with."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from string import ascii_letters
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification

from emloc.plugin import byte_tokenizer, lively_model

# yours: the model type, and sizes that differ from one another, so that a mix-up of two is noticed.
MODEL_TYPE = "bert"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
}


def write_example(folder: Path, seed: int) -> Mapping[str, Any]:
    """Write both; returns options that every stage of emloc accepts."""
    tokenizer = byte_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(MODEL_TYPE, **SIZES, **tokens)
    lively_model(AutoModelForSequenceClassification, config, seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(seed)
    words = ["".join(draw.choices(ascii_letters, k=draw.randint(3, 20))) for _ in range(24)]
    rows = [json.dumps({"text": word, "label": ord(word[0]) % 3}) for word in words]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    data = str(folder / "train.jsonl")
    return {"model_name_or_path": str(folder / "model"), "dataset": data, "max_length": 32}
