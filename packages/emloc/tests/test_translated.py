"""A checkpoint in another layout: what comes out, what is read for it, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.translated import TranslatedCheckpoint, whole
from emloc.errors import CheckpointError


@pytest.fixture
def stored(tmp_path):
    tensors = {"fused": torch.randn(10, 3).bfloat16(), "old.norm": torch.randn(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "old"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    return Checkpoint.open(tmp_path)


def rule(name, info):
    if name == "fused":
        return {
            "first": lambda t: t[:4],
            "rest": lambda t: t[4:].unflatten(0, (2, 3))[:, 1:].flatten(0, 1),
        }
    return {"new.norm": whole} if name == "old.norm" else {}


def test_names_shapes_and_values_are_the_new_layouts(stored):
    view = TranslatedCheckpoint(stored, {"model_type": "new"}, rule)
    assert view.translated
    assert not stored.translated
    assert view.config == {"model_type": "new"}
    assert list(view.tensors) == ["first", "new.norm", "rest"]
    assert view.tensors["rest"].shape == (4, 3)
    assert view.tensors["rest"].dtype == torch.bfloat16
    assert {info.file for info in view.tensors.values()} == {"model.safetensors"}
    assert dict(view.headers("model.safetensors")) == view.tensors
    fused = stored.read("fused")
    assert torch.equal(view.read("first"), fused[:4])
    assert torch.equal(view.read("rest"), fused[[5, 6, 8, 9]])
    assert torch.equal(view.read("new.norm"), stored.read("old.norm"))
    for name, info in view.tensors.items():
        assert tuple(view.read(name).shape) == info.shape
    with pytest.raises(CheckpointError, match="no tensor fused"):
        view.read("fused")


def test_a_slice_stays_in_the_file(stored, monkeypatch):
    view = TranslatedCheckpoint(stored, {}, rule)
    read = []
    monkeypatch.setattr(
        stored, "read", lambda name, read_=stored.read: read.append(name) or read_(name)
    )
    first = view.read("first")
    assert read == ["fused"]
    assert first._base is not None or first.untyped_storage().nbytes() > first.nbytes


def test_prefetch_is_of_the_stored_tensors(stored, monkeypatch):
    asked = []
    monkeypatch.setattr(stored, "prefetch", lambda names: asked.extend(names))
    TranslatedCheckpoint(stored, {}, rule).prefetch(["first", "rest", "new.norm"])
    assert asked == ["fused", "old.norm"]


def test_identity_is_of_what_lies_on_disk(stored):
    view = TranslatedCheckpoint(stored, {"model_type": "new"}, rule)
    assert view.digest() == stored.digest()
    assert view.companions() == stored.companions() == ["tokenizer.json"]
    assert view.companions_digest() == stored.companions_digest()
    assert view.reference_name() == stored.reference_name()


def test_unknown_misfitting_and_doubled_tensors_are_named(stored):
    with pytest.raises(CheckpointError, match="Tensor fused of .* does not belong"):
        TranslatedCheckpoint(stored, {}, lambda name, _: {} if name == "fused" else {name: whole})
    with pytest.raises(
        CheckpointError, match=r"Tensor fused of .* is \(10, 3\), which does not fit"
    ):
        TranslatedCheckpoint(stored, {}, lambda name, _: {name: lambda t: t.unflatten(0, (3, -1))})
    with pytest.raises(CheckpointError, match="Tensors fused and old.norm of .* are both same"):
        TranslatedCheckpoint(stored, {}, lambda *_: {"same": whole})
