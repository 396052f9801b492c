"""A family of one's own: encoders with a classification head, as a plugin module.

The head lies outside of the blocks and stays dense.
"""

import json
import random
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from emloc.plugin import (
    TRANSFORMERS_MODEL,
    Batch,
    Checkpoint,
    DataOptions,
    FamilyEntry,
    LengthOptions,
    SplitOptions,
    TrainingData,
    TransformersFamily,
    byte_tokenizer,
    dataset_names,
    hookimpl,
    lively_model,
    load_table,
    load_tokenizer,
)

SIZES = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "num_labels": 3,
}  # fmt: skip


class ClassifierFamily(TransformersFamily):
    """Encoders that say which of a few classes a text is of."""

    name = "classifier"
    auto_class = AutoModelForSequenceClassification
    new_head = ("classifier", "pooler")

    def example(self, config: Any, samples: int, length: int) -> Batch:
        """Texts of a class each."""
        ids = torch.zeros(samples, length, dtype=torch.int64)
        labels = torch.zeros(samples, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Cross-entropy of the classes."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs).logits
        high = torch.promote_types(logits.dtype, torch.float32)
        labels = batch["labels"]
        return nn.functional.cross_entropy(logits.to(high), labels, reduction="sum"), len(labels)

    def frozen(self, model: nn.Module, options: Any) -> Container[str]:
        """What is not in a block: the pooler and the head."""
        return {name for name, _ in model.named_modules() if ".layer." not in name}

    def data(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        """Rows with a text and the number of its class."""
        tokenizer = load_tokenizer(checkpoint.path)
        names = dataset_names(options)
        rows = [row for name in names for row in load_table(name, options.dataset_split, False)]

        def collate(part: Sequence[Any]) -> Batch:
            texts = [row["text"] for row in part]
            made = tokenizer(texts, padding=True, truncation=True, max_length=options.max_length)
            inputs = {key: torch.tensor(made[key]) for key in ("input_ids", "attention_mask")}
            return {**inputs, "labels": torch.tensor([int(row["label"]) for row in part])}

        return TrainingData(rows, collate, processing=tokenizer)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """Words, by the letter that they begin with."""
        tokenizer = byte_tokenizer()
        about = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        model = lively_model(self.auto_class, AutoConfig.for_model("bert", **SIZES, **about), seed)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        draw = random.Random(seed)
        words = ["".join(draw.choices(ascii_letters, k=draw.randint(3, 20))) for _ in range(24)]
        rows = [json.dumps({"text": word, "label": ord(word[0]) % 3}) for word in words]
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
        data = str(folder / "train.jsonl")
        return {"model_name_or_path": str(folder / "model"), "dataset": data, "max_length": 32}


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """Encoders of transformers with a classification head."""

    def recognises(config: Mapping[str, Any]) -> bool:
        kinds = ("ForSequenceClassification", "ForMaskedLM")
        return str(config.get("architectures")).strip("[']").endswith(kinds)

    target = f"{__name__}:ClassifierFamily"
    options = {DataOptions: (SplitOptions, LengthOptions)}
    more: Any = {"options": options, "offers": (TRANSFORMERS_MODEL,)}
    return [FamilyEntry("classifier", "text classifiers", target, recognises, **more)]
