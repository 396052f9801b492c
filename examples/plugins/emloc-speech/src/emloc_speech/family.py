"""The family `speech`: Whisper, which writes down what it hears."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSpeechSeq2Seq, WhisperConfig, WhisperFeatureExtractor

from emloc.plugin import (
    Batch,
    Checkpoint,
    DataOptions,
    TrainingData,
    TransformersFamily,
    dataset_names,
    load_tokenizer,
)
from emloc_speech.clips import Clip, read_clips, read_samples

IGNORED = -100
"""The label of a position that has no loss, as transformers means it."""

HEARD = ("encoder_attn.k_proj", "encoder_attn.v_proj")
"""Layers of the decoder that read the encoder's frames."""


class SpeechFamily(TransformersFamily):
    """Models that hear a window of audio and write down what is said in it."""

    name = "speech"
    auto_class = AutoModelForSpeechSeq2Seq

    def example(self, config: Any, samples: int, length: int) -> Batch:
        """A whole window of silence, and so many tokens written."""
        features = torch.zeros(samples, config.num_mel_bins, 2 * config.max_source_positions)
        labels = torch.zeros(samples, length, dtype=torch.int64)
        return {"input_features": features, "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """Cross-entropy of the tokens written; the model itself shifts the labels for its decoder."""
        kind = next(p.dtype for p in model.parameters() if p.is_floating_point())
        features, labels = batch["input_features"].to(kind), batch["labels"]
        logits = model(input_features=features, labels=labels).logits
        high = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
        total = nn.functional.cross_entropy(
            high, labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total, int((labels != IGNORED).sum())

    def token_mask(self, batch: Batch, layer: str | None = None) -> Tensor | None:
        """Padding of what is written; of what is heard, all is real, as no layer masks silence."""
        hears = layer is not None and (".encoder." in layer or layer.endswith(HEARD))
        return None if hears else batch["labels"] != IGNORED

    def data(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        """Clips with what is said in them, in their order."""
        tokenizer = load_tokenizer(checkpoint.path)
        extractor = WhisperFeatureExtractor.from_pretrained(checkpoint.path)
        config = WhisperConfig.from_pretrained(checkpoint.path)
        names = dataset_names(options)
        clips = [clip for name in names for clip in read_clips(name, options.dataset_split)]

        def written(text: str) -> list[int]:
            ids: list[int] = tokenizer(text)["input_ids"]
            # The model begins with this token by itself.
            ids = ids[1:] if ids[:1] == [config.decoder_start_token_id] else ids
            ended = ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
            return ended[: options.max_length]

        def collate(part: Sequence[Clip]) -> Batch:
            rate, window = extractor.sampling_rate, extractor.n_samples
            heard = [read_samples(clip.audio, rate, window) for clip in part]
            made = extractor(heard, sampling_rate=rate, return_tensors="pt")
            labels = [torch.tensor(written(clip.text)) for clip in part]
            padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
            return {"input_features": made["input_features"], "labels": padded}

        return TrainingData(clips, collate, processing=tokenizer)

    def data_files(self, options: DataOptions, dataset: str, split: str) -> Iterable[Path]:
        """The clips that the rows name, so that one that was exchanged is other data."""
        return (clip.audio for clip in read_clips(dataset, split))

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """A tiny model and clips; see `example.py`."""
        from emloc_speech.example import write_example

        return write_example(folder, seed)
