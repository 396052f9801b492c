"""A tiny model on disk with its data, for every test of the session."""

import os
from types import SimpleNamespace

import pytest
import torch

from emloc_llm.example import write_model, write_rows

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Llama of three blocks with shared keys, and rows to train and test on."""
    root = tmp_path_factory.mktemp("tiny")
    return SimpleNamespace(
        root=root,
        base=write_model(root / "base"),
        data=write_rows(root / "train.jsonl", 24, seed=1),
        test=write_rows(root / "test.jsonl", 6, seed=2),
    )
