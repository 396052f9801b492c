"""A tiny random Whisper and clips, for tests: a hum for every letter of a word."""

import json
import random
import string
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSpeechSeq2Seq, WhisperConfig, WhisperFeatureExtractor

from emloc.plugin import byte_tokenizer, lively_model

SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 24,
}
HEARING = {"feature_size": 8, "sampling_rate": 16000, "hop_length": 800, "chunk_length": 1}
"""A window of one second in twenty frames, of which the model makes ten."""


def write_example(folder: Path, seed: int) -> Mapping[str, Any]:
    """Write both; returns options that every stage of emloc accepts."""
    tokenizer = byte_tokenizer()
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokens = {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": start, **ends}
    config = WhisperConfig(vocab_size=len(tokenizer), **SIZES, **tokens)
    config.architectures = ["WhisperForConditionalGeneration"]
    lively_model(AutoModelForSpeechSeq2Seq, config, seed).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    WhisperFeatureExtractor(**HEARING).save_pretrained(folder / "model")
    draw = random.Random(seed)
    (folder / "clips").mkdir()
    rows: list[str] = []
    for number in range(24):
        word = "".join(draw.choices(string.ascii_lowercase, k=draw.randint(3, 12)))
        audio = f"clips/{number:02}.wav"
        _write_hum(folder / audio, word, draw.randrange(2**32))
        rows.append(json.dumps({"audio": audio, "text": word}))
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    data = str(folder / "train.jsonl")
    return {"model_name_or_path": str(folder / "model"), "dataset": data, "max_length": 20}


def _write_hum(path: Path, word: str, seed: int) -> None:
    """A twentieth of a second for each letter, in a pitch of its own, with noise."""
    time = np.arange(800) / 16000
    pitches = [200 * (1 + string.ascii_lowercase.index(letter)) for letter in word]
    hum = np.concatenate([np.sin(2 * np.pi * pitch * time) for pitch in pitches])
    noisy = 8000 * hum + np.random.default_rng(seed).normal(0, 400, hum.shape)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(noisy.astype("<i2").tobytes())
