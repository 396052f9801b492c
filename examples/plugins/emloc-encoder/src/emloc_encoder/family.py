"""The family `encoder`: text classifiers of transformers, such as BERT with a classification head."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from emloc.plugin import (
    Batch,
    Checkpoint,
    DataError,
    EvaluateConfig,
    TrainingData,
    TransformersFamily,
    dataset_names,
    load_table,
    load_tokenizer,
)


class EncoderFamily(TransformersFamily):
    """Encoders that tell which of a few classes a text, or a pair of texts, is of."""

    name = "encoder"
    auto_class = AutoModelForSequenceClassification
    task_type = "SEQ_CLS"
    right = 0

    def example(self, config: Any, samples: int, length: int) -> Batch:
        """Texts of the first class, of zeros alone."""
        ids = torch.zeros(samples, length, dtype=torch.int64)
        labels = torch.zeros(samples, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Cross-entropy, summed over texts; counts those whose class is told right."""
        logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
        labels, high = batch["labels"], torch.promote_types(logits.dtype, torch.float32)
        if not torch.is_grad_enabled():
            self.right += int((logits.argmax(-1) == labels).sum())
        return nn.functional.cross_entropy(logits.to(high), labels, reduction="sum"), len(labels)

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """The mean loss, and the share of texts whose class is told right."""
        self.right = 0
        scores = super().evaluate(config)
        return {**scores, "accuracy": self.right / scores["samples"]}

    def frozen(self, model: nn.Module, options: Any) -> Container[str]:
        """All that is in no block, such as the head: no LoRA goes on it."""
        inside = tuple(f"{block}." for block in self.blocks(model))
        return {name for name, _ in model.named_modules() if not name.startswith(inside)}

    def data(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        """Rows of `text`, `text_pair` where there are pairs, and `label`, a class's name or number."""
        tokenizer = load_tokenizer(checkpoint.path)
        config: Any = AutoConfig.from_pretrained(checkpoint.path)
        segments = {"token_type_ids"} if getattr(config, "type_vocab_size", 0) > 1 else set[str]()
        numbers = {**config.label2id, **{str(number): number for number in config.id2label}}
        rows = [
            _classified(row, numbers, f"{name}, row {number}")
            for name in dataset_names(options)
            for number, row in enumerate(load_table(name, options.dataset_split, False), 1)
        ]

        def collate(part: Sequence[Any]) -> Batch:
            texts = [row[:-1] if row[1] else row[0] for row in part]
            made = tokenizer(texts, padding=True, truncation=True, max_length=options.max_length)
            names = made.keys() & ({"input_ids", "attention_mask"} | segments)
            inputs = {name: torch.tensor(made[name]) for name in sorted(names)}
            return {**inputs, "labels": torch.tensor([row[-1] for row in part])}

        return TrainingData(rows, collate, processing=tokenizer)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """A tiny BERT and data; see `example.py`."""
        from emloc_encoder.example import write_example

        return write_example(folder, seed)


def _classified(row: Any, numbers: Mapping[str, int], place: str) -> tuple[str, str | None, int]:
    for column in ("text", "label"):
        if row.get(column) is None:
            raise DataError(f"{place}: the column {column!r} is missing or empty.")
    if str(row["label"]) not in numbers:
        raise DataError(
            f"{place}: the model knows no class {row['label']!r}; its config names {list(numbers)}."
        )
    return str(row["text"]), row.get("text_pair"), numbers[str(row["label"])]
