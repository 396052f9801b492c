"""Any family may read models that are one file; core keeps what it made of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError
from emloc.extend.family import FamilyEntry
from emloc.extend.single_file import model_folder


class Reader:
    """Of files whose tensors begin with `old.`; the folder drops that."""

    made = 0

    def configuration(self, file, named):
        if named is None:
            raise CheckpointError(f"{file.name}: pass single_file_config.")
        return Path(named)

    def write(self, file, configuration, folder):
        Reader.made += 1
        folder.mkdir()
        tensors = {name.removeprefix("old."): file.read(name) for name in file.tensors}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text((configuration / "config.json").read_text())


def entry(name, **more):
    return FamilyEntry(
        name=name, summary="", target="a:b", recognises=lambda config: False,
        single_file=f"{__name__}:Reader",
        recognises_file=lambda names: any(n.startswith("old.") for n in names), **more,
    )  # fmt: skip


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FamilyEntry, "load_single_file", lambda self: Reader())
    monkeypatch.setattr(Reader, "made", 0)
    save_file({"old.weight": torch.arange(6.0).view(2, 3)}, tmp_path / "m.safetensors")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps({"width": 3}))
    return tmp_path / "m.safetensors", str(tmp_path / "config")


def test_made_once_and_anew_for_other_content(made):
    file, config = made
    folder = model_folder(file, config, {"x": entry("x")})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config == {"width": 3}
    assert torch.equal(checkpoint.read("weight"), torch.arange(6.0).view(2, 3))
    assert model_folder(file, config, {"x": entry("x")}) == folder
    assert Reader.made == 1
    Path(config, "config.json").write_text(json.dumps({"width": 4}))
    assert model_folder(file, config, {"x": entry("x")}) != folder
    save_file({"old.weight": torch.ones(2, 3)}, file)
    again = Checkpoint.open(model_folder(file, config, {"x": entry("x")}))
    assert torch.equal(again.read("weight"), torch.ones(2, 3))
    assert Reader.made == 3


def test_who_reads_it_is_clear(made):
    file, config = made
    with pytest.raises(CheckpointError, match="Several families read .*: x, y"):
        model_folder(file, config, {"x": entry("x"), "y": entry("y")})
    with pytest.raises(CheckpointError, match="its first tensor is old.weight"):
        model_folder(file, config, {})
    with pytest.raises(CheckpointError, match="pass single_file_config"):
        model_folder(file, None, {"x": entry("x")})
