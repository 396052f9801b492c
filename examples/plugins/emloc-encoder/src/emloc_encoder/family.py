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
    LossSum,
    TrainingData,
    TransformersFamily,
    load_tokenizer,
)
from emloc_encoder.rows import Labelled, labelled_rows

DISTANCES = "reads distances between tokens as well as tokens"


class EncoderFamily(TransformersFamily):
    """Encoders that tell which of a few classes a text, or a pair of texts, is of."""

    name = "encoder"
    auto_class = AutoModelForSequenceClassification
    task_type = "SEQ_CLS"
    new_head = ("classifier", "pre_classifier", "pooler", "head")

    def example(self, config: Any, samples: int, length: int) -> Batch:
        """Texts of zeros, of the first class."""
        ids = torch.zeros(samples, length, dtype=torch.int64)
        labels = torch.zeros(samples, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Cross-entropy summed over texts, and their number."""
        logits, labels = logits_of(model, batch), batch["labels"]
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)

    def scores(self, model: nn.Module, batch: Batch) -> Mapping[str, LossSum]:
        """The loss, and how many texts were told right."""
        logits, labels = logits_of(model, batch), batch["labels"]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum()
        return {
            name: LossSum(float(total), len(labels))
            for name, total in (("loss", loss), ("accuracy", right))
        }

    def frozen(self, model: nn.Module, options: Any) -> Container[str]:
        """All that is in no block, such as the head: no LoRA goes on it."""
        inside = tuple(f"{block}." for block in self.blocks(model))
        return {name for name, _ in model.named_modules() if not name.startswith(inside)}

    def layer_groups(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """See `ModelFamily`; without the layers that `kept_dense` names."""
        kept = self.kept_dense(model)
        groups = [[name for name in g if name not in kept] for g in super().layer_groups(model)]
        return [group for group in groups if group]

    def kept_dense(self, model: nn.Module) -> Mapping[str, str]:
        """Also queries and keys of DeBERTa, whose inputs are more than the tokens of a mask."""
        kept = dict(super().kept_dense(model))
        if getattr(model.config, "relative_attention", False):
            ends = ("query_proj", "key_proj")
            kept |= {name: DISTANCES for name, _ in model.named_modules() if name.endswith(ends)}
        return kept

    def data(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        """Rows of `text`, perhaps `text_pair`, and `label`: a class's name or its number."""
        tokenizer = load_tokenizer(checkpoint.path)
        config: Any = AutoConfig.from_pretrained(checkpoint.path)
        wanted = {"input_ids", "attention_mask"}
        if getattr(config, "type_vocab_size", 0) > 1:
            wanted.add("token_type_ids")

        def collate(part: Sequence[Labelled]) -> Batch:
            texts = [row.text if row.pair is None else (row.text, row.pair) for row in part]
            made = tokenizer(texts, padding=True, truncation=True, max_length=options.max_length)
            inputs = {name: torch.tensor(made[name]) for name in made if name in wanted}
            return {**inputs, "labels": torch.tensor([row.label for row in part])}

        rows = list(labelled_rows(options, config))
        return TrainingData(rows, collate, processing=tokenizer)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """A tiny BERT and its data."""
        from emloc_encoder.example import write_example

        return write_example(folder, seed)


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Texts × classes, in float32 or better."""
    logits = model(**{name: batch[name] for name in batch if name != "labels"}).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
