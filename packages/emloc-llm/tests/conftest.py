"""Tiny random checkpoints and one run of all stages, shared by the tests of a session."""

import os
from types import SimpleNamespace

import pytest
import torch

import emloc
from emloc_llm.example import write_model, write_rows

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Llama in one shard, its data, and an emulator, adapter and corrected adapter of it."""
    root = tmp_path_factory.mktemp("tiny")
    made = SimpleNamespace(
        root=root,
        base=write_model(root / "base"),
        data=write_rows(root / "train.jsonl", 24, seed=1),
        test=write_rows(root / "test.jsonl", 8, seed=2),
    )
    common = {"dataset": str(made.data), "max_length": 96}
    made.emulator = emloc.compress(
        model_name_or_path=str(made.base),
        output_dir=root / "emulator",
        format="low_rank",
        keep_ratio=0.5,
        **common,
    )
    made.train_options = {
        "emulator": str(made.emulator), "max_steps": 6, "save_steps": 2, "logging_steps": 1,
        "learning_rate": 5e-3, "lora_r": 4, "lora_alpha": 12, **common,
    }  # fmt: skip
    made.adapter = emloc.train(output_dir=root / "adapter", **made.train_options)
    made.correct_options = {
        "adapter": str(made.adapter), "emulator": str(made.emulator), **common,
    }  # fmt: skip
    made.corrected = emloc.correct(
        output_dir=root / "corrected", limit="none", **made.correct_options
    )
    return made


@pytest.fixture
def batch():
    """Token ids of two lengths with their mask."""
    ids = torch.randint(3, 250, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}
