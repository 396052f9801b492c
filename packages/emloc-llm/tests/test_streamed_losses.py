"""What a streamed step of a language model is planned to take, and what it leaves out of its loss."""

import json

import pytest
import torch
from tiny_models import write_tiny

import emloc
from emloc_llm.example import write_model, write_rows
from emloc_llm.training import Trainer


def losses(folder):
    lines = (folder / "trainer_log.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_routers_are_left_alone_and_it_is_said(tmp_path, capfd, monkeypatch):
    """TRL adds their balance to the loss; within a streamed block it would have no gradient."""
    write_tiny(tmp_path / "base", "mixtral")
    options = {
        "model_name_or_path": str(tmp_path / "base"),
        "dataset": str(write_rows(tmp_path / "train.jsonl", 8, seed=1)), "max_length": 96,
        "max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "device": "cpu",
    }  # fmt: skip
    streamed = emloc.train(output_dir=tmp_path / "streamed", stream=True, **options)
    said = " ".join(capfd.readouterr().err.split())
    assert said.count("stream=true: experts' routers are not balanced") == 1
    whole = emloc.train(output_dir=tmp_path / "whole", **options)
    assert "not balanced" not in capfd.readouterr().err
    for without, with_balance in zip(losses(streamed), losses(whole), strict=True):
        assert 0 < with_balance - without < 0.1

    class Plain(Trainer):
        def compute_loss(self, *given, **named):
            self.aux_loss_enabled = False
            return super().compute_loss(*given, **named)

    monkeypatch.setattr("emloc_llm.training.Trainer", Plain)
    assert losses(emloc.train(output_dir=tmp_path / "plain", **options)) == pytest.approx(
        losses(streamed), rel=1e-4
    )


def test_a_scaled_table_is_multiplied_in_the_dtype_of_training(tmp_path):
    """Gemma's scale is the root of the width, which bfloat16 rounds."""
    write_tiny(tmp_path / "base", "gemma2", torch.bfloat16)
    options = {
        "model_name_or_path": str(tmp_path / "base"), "dtype": "float32", "max_length": 96,
        "dataset": str(write_rows(tmp_path / "train.jsonl", 8, seed=1)), "max_steps": 2,
        "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "device": "cpu",
    }  # fmt: skip
    streamed = emloc.train(output_dir=tmp_path / "streamed", stream=True, **options)
    whole = emloc.train(output_dir=tmp_path / "whole", **options)
    assert losses(streamed) == pytest.approx(losses(whole), rel=1e-6)


def test_a_plan_counts_the_logits_of_a_streamed_step(tmp_path):
    """A step in memory takes them tile by tile, however large the vocabulary."""
    size, tokens = 100_000, 4 * 511
    model = write_model(tmp_path / "base", vocab_size=size, hidden_size=64, head_dim=16)
    options = {"model_name_or_path": str(model), "max_length": 512, "device": "cuda",
               "per_device_train_batch_size": 4}  # fmt: skip

    def loss(**more):
        return emloc.plan(**options, **more)["stages"]["train"]["device_bytes"]["lines"][
            "logits and loss"
        ]

    assert loss(stream=True) > 8 * tokens * size > 3 * loss()
