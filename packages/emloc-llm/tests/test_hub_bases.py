"""Adapters of others whose base is on the hub: its revision, and whether it is an emulator."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from llm_reference import load
from peft import LoraConfig, get_peft_model

import emloc
from emloc.errors import MismatchError
from emloc_llm.example import write_model


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a folder into the hub's cache under an id and a revision."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder, name, revision="main", only=None):
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = format(sum(map(ord, revision)), "040x")
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        ignored = None if only is None else lambda _, names: set(names) - only
        shutil.copytree(folder, repository / "snapshots" / commit, ignore=ignored)

    return put


def stock_adapter(base, folder, name, revision=None):
    """A LoRA of stock PEFT whose config calls its base so."""
    model = get_peft_model(
        load(base), LoraConfig(r=4, target_modules=["q_proj"], revision=revision)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
    return str(folder)


def test_another_revision_is_refused_and_its_folder_taken(hub, tmp_path):
    other = write_model(tmp_path / "v1", seed=1)
    hub(write_model(tmp_path / "main", seed=0), "me/m")
    hub(other, "me/m", "v1")
    adapter = stock_adapter(other, tmp_path / "a", "me/m", "v1")
    said = "revision v1 of me/m"
    with pytest.raises(MismatchError, match=said):
        emloc.merge(adapter=adapter, output_dir=tmp_path / "m")
    for stage in ("merge", "correct", "polish"):
        with pytest.raises(MismatchError, match=said):
            getattr(emloc, stage)(
                adapter=adapter, model_name_or_path="me/m", output_dir=tmp_path / "m",
                **({} if stage == "merge" else {"dataset": "unread.jsonl"}),
            )  # fmt: skip
    with pytest.raises(MismatchError, match=said):
        emloc.evaluate(adapter=adapter, model_name_or_path="me/m", dataset="unread.jsonl")
    with pytest.raises(MismatchError, match=said):
        emloc.train(
            adapter=adapter, model_name_or_path="me/m", dataset="unread.jsonl", max_steps=1,
            output_dir=tmp_path / "m",
        )  # fmt: skip
    emloc.merge(adapter=adapter, model_name_or_path=str(other), output_dir=tmp_path / "m")


@pytest.mark.parametrize("only", [None, {"config.json"}], ids=["downloaded", "from_pretrained"])
def test_an_emulator_of_the_hub_is_one(tiny, hub, tmp_path, only):
    hub(tiny.emulator, "me/emulator", only=only)
    adapter = stock_adapter(tiny.emulator, tmp_path / "a", "me/emulator")
    base = str(tiny.base)
    with pytest.raises(MismatchError, match="not corrected"):
        emloc.merge(adapter=adapter, model_name_or_path=base, output_dir=tmp_path / "m")
    with pytest.raises(MismatchError, match="not corrected"):
        emloc.evaluate(adapter=adapter, model_name_or_path=base, dataset=str(tiny.data))
    corrected = emloc.correct(
        adapter=adapter, emulator=str(tiny.emulator), limit="none", output_dir=tmp_path / "c"
    )
    emloc.merge(adapter=str(corrected), output_dir=tmp_path / "m")
