"""A family without scores of its own is judged by its loss, compared with that of the toy's own scoring."""

import builtins

import pytest

import emloc
from emloc.errors import DependencyError
from emloc.extend.capabilities import Evaluates
from emloc.extend.family import REQUIRED, FamilyEntry
from emloc.testing.toy_family import ToyFamily


class Bare:
    """The toy with what is required of every family, and nothing else."""

    def __init__(self):
        toy = ToyFamily()
        for name in REQUIRED:
            setattr(self, name, getattr(toy, name))


def test_the_loss_of_all_samples_is_that_of_its_own_scoring(toy, monkeypatch, tmp_path):
    models = [toy.example["model_name_or_path"], str(toy.stages["emulator"])]
    own = [emloc.evaluate(**{**toy.example, "model_name_or_path": model}) for model in models]
    monkeypatch.setattr(FamilyEntry, "load", lambda entry: Bare())
    assert not isinstance(Bare(), Evaluates)
    for model, before in zip(models, own, strict=True):
        scores = emloc.evaluate(**{**toy.example, "model_name_or_path": model}, num_samples=100)
        assert scores["samples"] == before["samples"] == 24
        assert scores["loss"] == pytest.approx(before["loss"], rel=1e-6)
    few = emloc.evaluate(**toy.example, num_samples=5, output_dir=tmp_path / "scores")
    assert few["samples"] == 5
    assert emloc.evaluate(**toy.example, num_samples=5, output_dir=tmp_path / "scores") == few


def test_an_adapter_needs_peft(toy, monkeypatch):
    real = builtins.__import__

    def without_peft(name, *given):
        if name.partition(".")[0] == "peft" or name == "emloc.integrations.peft.attach":
            raise ImportError(name)
        return real(name, *given)

    monkeypatch.setattr(FamilyEntry, "load", lambda entry: Bare())
    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(DependencyError, match="pip install peft"):
        emloc.evaluate(**toy.example, adapter=str(toy.stages["corrected"]))
