"""Reading shards: what is there comes back, what is broken is named."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.errors import CheckpointError


@pytest.fixture
def folder(tmp_path):
    first = {"a.weight": torch.randn(5, 3), "b.weight": torch.randn(7).bfloat16()}
    second = {"c.weight": torch.randn(2, 2).half()}
    save_file(first, tmp_path / "model-00001-of-00002.safetensors")
    save_file(second, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a.weight": "model-00001-of-00002.safetensors",
                  "b.weight": "model-00001-of-00002.safetensors",
                  "c.weight": "model-00002-of-00002.safetensors"}  # fmt: skip
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_reads_shards_by_name(folder):
    checkpoint = Checkpoint.open(folder)
    assert list(checkpoint.tensors) == ["a.weight", "b.weight", "c.weight"]
    assert checkpoint.read("b.weight").dtype == torch.bfloat16
    assert checkpoint.tensors["a.weight"].shape == (5, 3)
    assert checkpoint.tensors["c.weight"].nbytes == 8
    with pytest.raises(CheckpointError, match="no tensor d"):
        checkpoint.read("d")


def test_digest_sees_names_shapes_and_values(folder):
    before = Checkpoint.open(folder).digest()
    assert Checkpoint.open(folder).digest() == before
    save_file({"c.weight": torch.ones(2, 2).half()}, folder / "model-00002-of-00002.safetensors")
    assert Checkpoint.open(folder).digest() != before


def test_reading_costs_no_anonymous_memory(tmp_path):
    from emloc.machine.memory import anonymous_bytes

    save_file({"w": torch.randn(4096, 4096)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    before = anonymous_bytes()
    tensor = checkpoint.read("w")
    assert float(tensor.sum()) != 0
    assert anonymous_bytes() - before < 16 * 2**20 < tensor.nbytes


def test_missing_shard(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="00002-of-00002.safetensors is missing"):
        Checkpoint.open(folder)


def test_truncated_shard(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="incomplete or corrupt"):
        Checkpoint.open(folder)


def test_promised_tensor_that_is_not_there(folder):
    save_file({"other": torch.ones(1)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"does not hold the tensor c\.weight"):
        Checkpoint.open(folder)


def test_index_may_not_leave_the_folder(folder):
    index = {"weight_map": {"a.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="which lies outside"):
        Checkpoint.open(folder)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="pickle"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_broken_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(folder)


def test_unknown_folder_and_hub_id(monkeypatch):
    with pytest.raises(CheckpointError, match="No folder /nowhere/at/all"):
        locate("/nowhere/at/all")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for weights in (True, False):
        with pytest.raises(CheckpointError, match="hub did not provide it"):
            locate("nobody/nothing-here", weights)


def test_a_config_is_had_without_weights(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append({pattern for pattern in allow_patterns if "safetensors" in pattern})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate("somebody/model") == locate("somebody/model", weights=False) == tmp_path
    assert (bool(asked[0]), asked[1]) == (True, set())


def test_a_config_that_is_a_pipe_or_leads_out_is_not_opened(folder, tmp_path_factory):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(CheckpointError, match=r"config.json is a pipe, not a file"):
        Checkpoint.open(folder)
    (folder / "config.json").unlink()
    outside = tmp_path_factory.mktemp("outside") / "config.json"
    outside.write_text("{}")
    for target in (outside, "/dev/zero"):
        (folder / "config.json").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"config.json is a link that leads out of"):
            Checkpoint.open(folder)
        (folder / "config.json").unlink()


def test_a_snapshot_of_the_hub_is_read_through_its_links(folder, tmp_path_factory):
    repository = tmp_path_factory.mktemp("hub") / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert list(Checkpoint.open(snapshot).tensors) == ["a.weight", "b.weight", "c.weight"]
