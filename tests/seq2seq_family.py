"""A family of one's own with two stacks: encoders and decoders of text, as two plugins' worth of models.

`text-to-text` writes a T5 (biases of relative positions that blocks hand on, one table for encoder, decoder
and head), `text-to-text-bart` a BART (learned positions, biases everywhere).
"""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_letters
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM

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

IGNORED = -100
CROSS = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")
"""Layers of decoders that read what the encoder wrote."""


class Seq2SeqFamily(TransformersFamily):
    """Encoders and decoders that write a text of another."""

    name = "text-to-text"
    auto_class = AutoModelForSeq2SeqLM
    task_type = "SEQ_2_SEQ_LM"
    model_type = "t5"
    sizes: ClassVar[dict[str, Any]] = {
        "d_model": 32, "d_kv": 12, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2,
        "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0,
    }  # fmt: skip

    def example(self, config: Any, samples: int, length: int) -> Batch:
        """Texts of one length, and what is written of them."""
        ids = torch.zeros(samples, length, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Cross-entropy of what is written; the model shifts the labels for its decoder."""
        logits, labels = model(**batch).logits, batch["labels"]
        high = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = nn.functional.cross_entropy(
            high.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total, int((labels != IGNORED).sum())

    def token_mask(self, batch: Batch, layer: str | None = None) -> Tensor | None:
        """The text's mask in the encoder and where decoders look at it; elsewhere that of what is written."""
        reads = layer is not None and (".encoder." in f".{layer}" or layer.endswith(CROSS))
        mask = batch["attention_mask"].bool() if reads else batch["labels"] != IGNORED
        return None if layer is not None and bool(mask.all()) else mask

    def data(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        """Rows of a source and a target."""
        tokenizer = load_tokenizer(checkpoint.path)
        names = dataset_names(options)
        rows = [row for name in names for row in load_table(name, options.dataset_split, False)]

        def collate(part: Sequence[Any]) -> Batch:
            def encoded(column: str) -> Any:
                texts = [row[column] for row in part]
                most = options.max_length
                return tokenizer(
                    texts, padding=True, truncation=True, max_length=most, return_tensors="pt"
                )

            source, target = encoded("source"), encoded("target")
            labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)
            return {**{k: source[k] for k in ("input_ids", "attention_mask")}, "labels": labels}

        return TrainingData(rows, collate, processing=tokenizer)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """Words, and their first letters backwards."""
        tokenizer = byte_tokenizer()
        ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        about = {"vocab_size": len(tokenizer), "decoder_start_token_id": 0, **ends, **self.sizes}
        config = AutoConfig.for_model(self.model_type, **about)
        lively_model(self.auto_class, config, seed).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        draw = random.Random(seed)
        words = ["".join(draw.choices(ascii_letters, k=draw.randint(3, 20))) for _ in range(24)]
        cuts = [draw.randint(2, 9) for _ in words]
        rows = [json.dumps({"source": w, "target": w[:c][::-1]}) for w, c in zip(words, cuts)]
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
        data = str(folder / "train.jsonl")
        return {"model_name_or_path": str(folder / "model"), "dataset": data, "max_length": 48}


class BartFamily(Seq2SeqFamily):
    """The same of BART."""

    name = "text-to-text-bart"
    model_type = "bart"
    sizes: ClassVar[dict[str, Any]] = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 48,
        "max_position_embeddings": 32, "dropout": 0.0, "bos_token_id": 1, "forced_eos_token_id": 2,
    }  # fmt: skip


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """Both."""

    def registered(kind: type[Seq2SeqFamily], architecture: str) -> FamilyEntry:
        def recognises(config: Mapping[str, Any]) -> bool:
            names = config.get("architectures")
            return isinstance(names, list) and architecture in names

        target = f"{__name__}:{kind.__name__}"
        options = {DataOptions: (SplitOptions, LengthOptions)}
        more: Any = {"options": options, "offers": (TRANSFORMERS_MODEL,)}
        return FamilyEntry(kind.name, "text to text", target, recognises, **more)

    return [
        registered(Seq2SeqFamily, "T5ForConditionalGeneration"),
        registered(BartFamily, "BartForConditionalGeneration"),
    ]
