"""The family `encoder`: models of the kind encoder."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from emloc.plugin import (
    Batch,
    Checkpoint,
    TrainingData,
    TransformersFamily,
    dataset_names,
    load_table,
    load_tokenizer,
)


class EncoderFamily(TransformersFamily):
    """Models that say which of a few classes a text is of."""

    name = "encoder"
    auto_class = AutoModelForSequenceClassification  # yours: the auto class that loads the models

    def example(self, config: Any, samples: int, length: int) -> Batch:
        """Zeros as the forward takes them, with labels: layers and memory are traced on them."""
        # yours: every input that the forward needs, samples first.
        ids = torch.zeros(samples, length, dtype=torch.int64)
        labels = torch.zeros(samples, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The sum over samples, and their number."""
        # yours: a sum over what the loss averages, never a mean, in float32 or better.
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        logits = model(**inputs).logits.float()
        labels = batch["labels"]
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)

    def frozen(self, model: nn.Module, options: Any) -> Container[str]:
        """All that is in no block, such as a head: no LoRA goes on it."""
        inside = tuple(f"{block}." for block in self.blocks(model))
        return {name for name, _ in model.named_modules() if not name.startswith(inside)}

    def data(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        """Rows in their order, and what makes a micro-batch of some."""
        # yours: the columns. Padded positions need an attention_mask, by which they are left out.
        tokenizer = load_tokenizer(checkpoint.path)
        names = dataset_names(options)
        rows = [row for name in names for row in load_table(name, options.dataset_split, False)]

        def collate(part: Sequence[Any]) -> Batch:
            texts = [str(row["text"]) for row in part]
            made = tokenizer(texts, padding=True, truncation=True, max_length=options.max_length)
            inputs = {key: torch.tensor(made[key]) for key in ("input_ids", "attention_mask")}
            return {**inputs, "labels": torch.tensor([int(row["label"]) for row in part])}

        return TrainingData(rows, collate, processing=tokenizer)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """A tiny model and data; see `example.py`."""
        from emloc_encoder.example import write_example

        return write_example(folder, seed)
