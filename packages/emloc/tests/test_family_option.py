"""`family=NAME`: whose model it is, where several families recognise it."""

import importlib.metadata
import json
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.config import CompressConfig, build
from emloc.errors import PluginError
from emloc.extend.family import REQUIRED, FamilyEntry
from emloc.extend.opening import named_family, open_model
from emloc.extend.plugin_options import own_options


class Toy:
    """Enough of a family for a model to be opened."""

    def native(self, checkpoint):
        return checkpoint


def toy(name):
    family = Toy()
    for required in REQUIRED:  # which opening a model does not call
        setattr(family, required, None)
    family.name = name
    return family


@pytest.fixture
def two(tmp_path, monkeypatch):
    """A model that two families recognise, `sound` and `music`; `speech` does not."""
    module = types.ModuleType("toy_families")
    for name in ("sound", "music", "speech"):
        setattr(module, name, toy(name))

    def emloc_register_families():
        return [
            FamilyEntry(
                name,
                "a toy",
                f"toy_families:{name}",
                lambda config, known=known: known == config["model_type"],
            )
            for name, known in (("sound", "toy"), ("music", "toy"), ("speech", "speech"))
        ]

    module.emloc_register_families = emloc.hookimpl(emloc_register_families)
    plugin = types.SimpleNamespace(name="toys", load=lambda: module)
    monkeypatch.setitem(sys.modules, "toy_families", module)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [plugin])
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "toy"}))
    save_file({"weight": torch.ones(2, 3)}, folder / "model.safetensors")
    return folder


def written_by(folder, family):
    base = ModelReference(name_or_path="base", digest="0" * 64)
    Manifest(format=1, kind="merged_model", family=family, base_model=base).write(folder)


def test_several_families_name_the_option(two):
    with pytest.raises(PluginError, match=r"\(toy\): sound, music; pass family=NAME\."):
        open_model(two)


def test_the_named_one_is_taken(two):
    assert [open_model(two, family=name)[1].name for name in ("sound", "music")] == [
        "sound",
        "music",
    ]


def test_what_wrote_it_is_taken_by_default(two):
    assert open_model(two, recorded="music")[1].name == "music"
    written_by(two, "music")
    assert open_model(two)[1].name == "music"
    assert open_model(two, family="sound")[1].name == "sound"
    assert open_model(two, recorded="sound")[1].name == "sound"


def test_one_that_does_not_recognise_it_is_refused(two):
    with pytest.raises(
        PluginError, match="family=speech: it does not recognise .*; sound, music would"
    ):
        open_model(two, family="speech")
    with pytest.raises(PluginError, match="pass family=NAME"):
        open_model(two, recorded="speech")


def test_one_that_is_not_installed_is_refused(two):
    with pytest.raises(PluginError, match="offers the family 'audio'"):
        open_model(two, family="audio")


def test_settings_know_it_only_where_there_is_a_choice(two):
    model, family = open_model(two, family="music")
    assert named_family(model, family) == {"family": "music"}
    config = build(
        CompressConfig, {"model_name_or_path": "m", "output_dir": "o", "family": "music"}, "x"
    )
    assert "family" not in own_options(config, set())
    sole = {"model_type": "speech"}
    assert named_family(Checkpoint("m", two, sole, {}), toy("speech")) == {}


@pytest.mark.parametrize(
    "stage", ["plan", "compress", "train", "correct", "merge", "evaluate", "verify"]
)
def test_every_stage_that_opens_a_model_takes_it(stage):
    assert getattr(emloc, stage).config.model_fields["family"].default is None


def test_a_family_of_another_version_is_one_sentence(two, monkeypatch):
    monkeypatch.delattr(sys.modules["toy_families"].sound, "loss")
    with pytest.raises(PluginError, match="family sound of plugin toys lacks loss: it was written"):
        open_model(str(two), family="sound")
