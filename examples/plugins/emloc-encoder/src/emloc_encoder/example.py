"""Tiny random classifiers and data for tests: words, by the letter that they begin with."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from string import ascii_letters
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification

from emloc.plugin import byte_tokenizer, lively_model

CLASSES = ("first", "second", "third")

# Sizes differ from one another, so that a mix-up of two is noticed.
USUAL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

SIZES: dict[str, dict[str, Any]] = {
    "bert": USUAL,
    "roberta": USUAL,
    "distilbert": {
        "dim": 48,
        "hidden_dim": 80,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 64,
    },
    "electra": {**USUAL, "embedding_size": 32},
    # The attention of DeBERTa-v3, which reads tokens and distances with the same layers.
    "deberta-v2": {
        **USUAL,
        "pooler_hidden_size": 48,
        "relative_attention": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "layer_norm_eps": 1e-7,
    },
    "modernbert": {**USUAL, "global_attn_every_n_layers": 2, "local_attention": 8},
    "albert": {**USUAL, "embedding_size": 32},
}


def write_example(folder: Path, seed: int, model_type: str = "bert") -> Mapping[str, Any]:
    """Write both; returns options that every stage of emloc accepts."""
    tokenizer = byte_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
    names = {
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: number for number, name in enumerate(CLASSES)},
    }
    config = AutoConfig.for_model(model_type, **SIZES[model_type], **tokens, **ends, **names)
    lively_model(AutoModelForSequenceClassification, config, seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = random.Random(seed)
    words = ["".join(draw.choices(ascii_letters, k=draw.randint(3, 20))) for _ in range(24)]
    rows = [{"text": word, "label": ord(word[0]) % 3} for word in words]
    for row in rows[::2]:
        row["label"] = CLASSES[row["label"]]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(folder / "train.jsonl")
    return {"model_name_or_path": str(folder / "model"), "dataset": data, "max_length": 32}
