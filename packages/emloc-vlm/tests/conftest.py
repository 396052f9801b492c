"""Tiny random checkpoints, shared by the tests of a session."""

import os
from types import SimpleNamespace

import pytest
import torch

import emloc
from emloc_vlm.example import write_model, write_rows

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """An InternVL, its data, and an emulator, adapter and corrected adapter of it."""
    root = tmp_path_factory.mktemp("tiny-vlm")
    made = SimpleNamespace(
        root=root,
        base=write_model(root / "base"),
        data=write_rows(root / "train.jsonl", 24, seed=1),
        test=write_rows(root / "test.jsonl", 8, seed=2),
    )
    made.common = {"dataset": str(made.data), "max_length": 96}
    made.emulator = emloc.compress(
        model_name_or_path=str(made.base), output_dir=root / "emulator", format="low_rank", keep_ratio=0.5,
        **made.common,
    )  # fmt: skip
    made.train_options = {
        "emulator": str(made.emulator), "max_steps": 4, "save_steps": 2, "logging_steps": 1,
        "learning_rate": 5e-3, "lora_r": 4, "lora_alpha": 12, **made.common,
    }  # fmt: skip
    made.adapter = emloc.train(output_dir=root / "adapter", **made.train_options)
    made.corrected = emloc.correct(
        adapter=str(made.adapter), emulator=str(made.emulator), output_dir=root / "corrected",
        limit="none", **made.common,
    )  # fmt: skip
    return made
