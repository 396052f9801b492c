"""`verify` walks from a merged model or a corrected adapter to the base, and compares what they give."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError, EmlocError, MismatchError
from emloc.testing.resealed import resealed
from emloc.testing.toy_family import write_toy
from emloc.testing.toy_model import ToySizes


def links(report):
    return [(link["kind"], link["checked"]) for link in report["chain"]]


def copy(toy, name, tmp_path):
    return shutil.copytree(toy.stages[name], tmp_path / name)


def change(folder, pick, by):
    """Add to one number in the middle of a tensor, and have the manifest say that it was always so."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    tensor = tensors[next(key for key in tensors if pick in key)].view(-1)
    tensor[len(tensor) // 2] += by
    save_file(tensors, path, metadata={"format": "pt"})
    return resealed(folder)


def made_from(folder, key, other):
    """The manifest names another folder as what it was made from."""
    content = json.loads((folder / "emloc.json").read_text())
    content[key]["name_or_path"] = str(other)
    (folder / "emloc.json").write_text(json.dumps(content))
    return resealed(folder)


def test_it_goes_back_to_the_base(toy):
    every = [("adapter", True), ("adapter", True), ("emulator", True), ("base", True)]
    merged = emloc.verify(path=toy.stages["merged"])
    assert links(merged) == every
    assert merged["compared"]["outputs"] > 12 * 12  # of twelve layers
    assert merged["compared"]["tensors"] == len(Checkpoint.open(toy.stages["merged"]).tensors) - 12
    assert 0 < merged["compared"]["largest"] <= 1
    assert links(emloc.verify(path=toy.stages["corrected"])) == every[1:]
    assert links(emloc.verify(path=toy.stages["adapter"])) == every[2:]
    assert links(emloc.verify(path=toy.stages["emulator"])) == every[3:]


@pytest.mark.parametrize(
    ("pick", "message"),
    [("gate.weight", "gives different outputs"), ("conv.weight", "gives different outputs"),
     ("norm.weight", "is not what"), ("gate.bias", "is not what")],
)  # fmt: skip
def test_a_merged_model_of_other_weights_is_found(toy, tmp_path, pick, message):
    """Its own manifest lists its bytes as they are; what it was made from gives others."""
    folder = copy(toy, "merged", tmp_path)
    with pytest.raises(MismatchError, match=message):
        emloc.verify(path=change(folder, pick, 0.5))


def test_a_lora_that_was_merged_twice_is_found(toy, tmp_path):
    """Every weight is a little off, as with another scaling."""
    merged, base = (load_file(f) for f in (
        toy.stages["merged"] / "model.safetensors", toy.checkpoint.path / "model.safetensors"))  # fmt: skip
    folder = copy(toy, "merged", tmp_path)
    twice = {name: 2 * merged[name] - base[name] for name in merged}
    save_file(twice, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match="gives different outputs from .* times what rounding"):
        emloc.verify(path=resealed(folder))


@pytest.mark.parametrize("key", ["adapter", "emulator", "base_model"])
def test_what_it_was_made_from_is_compared(toy, tmp_path, key):
    """An adapter, an emulator or a base in the place of the right one, each whole by itself."""
    folder = copy(toy, "corrected", tmp_path)
    if key == "adapter":
        other = change(copy(toy, "adapter", tmp_path), "lora_A", 0.5)
    elif key == "emulator":
        other = change(copy(toy, "emulator", tmp_path), "bias", 0.5)
    else:
        other = write_toy(tmp_path / "base", ToySizes(), 5)
    if key == "emulator":  # in the adapter's chain as well
        made_from(folder, "adapter", "/gone")
    with pytest.raises(EmlocError, match="another adapter|other weights|other emulator"):
        emloc.verify(path=made_from(folder, key, other))
    named = {"adapter": {"adapter": str(other)}, "base_model": {"model_name_or_path": str(other)}}
    if key in named:
        with pytest.raises(MismatchError, match="another adapter|other weights"):
            emloc.verify(path=toy.stages["corrected"], **named[key])


def test_a_broken_link_further_back_is_found(toy, tmp_path):
    """The merged model is as it was, and so is its adapter; what that was corrected from is not."""
    trained, corrected = copy(toy, "adapter", tmp_path), copy(toy, "corrected", tmp_path)
    merged = copy(toy, "merged", tmp_path)
    made_from(merged, "adapter", made_from(corrected, "adapter", trained))
    emloc.verify(path=merged)
    content = bytearray((trained / "adapter_model.safetensors").read_bytes())
    content[-9] ^= 4
    (trained / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is not what was written"):
        emloc.verify(path=merged)


def test_a_correction_leaves_what_the_lora_reads(toy, tmp_path):
    folder = copy(toy, "corrected", tmp_path)
    with pytest.raises(MismatchError, match="A of .* is not that of"):
        emloc.verify(path=change(folder, "lora_A", 0.5))


def test_what_is_not_here_is_said_not_to_be(toy, tmp_path, capsys):
    folder = made_from(copy(toy, "merged", tmp_path), "adapter", "/gone/corrected")
    report = emloc.verify(path=folder)
    assert links(report) == [("adapter", False), ("base", True)]
    assert "compared" not in report
    assert "the adapter /gone/corrected, which is not here" in capsys.readouterr().err
    report = emloc.verify(path=folder, adapter=str(toy.stages["corrected"]))
    assert links(report)[0] == ("adapter", True)
    assert report["compared"]["outputs"] > 0
