"""The contract notices families that break it, each in the law that it breaks."""

import copy
import importlib
import sys

import pytest
import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.testing.contract import FamilyContract
from emloc.testing.toy_family import ToyFamily


class Ungrouped(ToyFamily):
    def layer_groups(self, model):
        return [[name] for group in super().layer_groups(model) for name in group]


class Mixed(ToyFamily):
    def layer_groups(self, model):
        return [[f"{block}.{n}" for n in ("gate", "up", "down")] for block in self.blocks(model)]


class Heavy(ToyFamily):
    def skeleton(self, checkpoint, dtype):
        return super().skeleton(checkpoint, dtype).to_empty(device="cpu")


class Forgetful(ToyFamily):
    def stored(self, model, parameter, checkpoint):
        return None if "norm" in parameter else super().stored(model, parameter, checkpoint)


class OneBlock(ToyFamily):
    def blocks(self, model):
        return ["blocks"]


class Averaging(ToyFamily):
    def loss(self, model, batch):
        total, terms = super().loss(model, batch)
        return total / terms, terms


class Detached(ToyFamily):
    def loss(self, model, batch):
        total, terms = super().loss(model, batch)
        return total.detach(), terms


class Unseeded(ToyFamily):
    def calibration_batches(self, checkpoint, options):
        return super().calibration_batches(checkpoint, options.model_copy(update={"seed": 5}))


class Training(ToyFamily):
    def load(self, checkpoint, dtype, device):
        return super().load(checkpoint, dtype, device).train()


class Weighted(ToyFamily):
    def token_mask(self, batch, layer=None):
        return torch.ones(len(batch["labels"]))


class Dense(ToyFamily):
    """Loads no emulator, but the base that it was made of."""

    def load(self, checkpoint, dtype, device):
        manifest = Manifest.find(checkpoint.path)
        base = checkpoint if manifest is None else Checkpoint.open(manifest.base_model.name_or_path)
        return super().load(base, dtype, device)


LAWS = {
    Ungrouped: "groups_are_the_layers_that_share_their_input",
    Mixed: "blocks_and_layers",
    Heavy: "skeleton_has_no_weights_and_real_buffers",
    Forgetful: "skeleton_has_no_weights_and_real_buffers",
    OneBlock: "blocks_and_layers",
    Detached: "a_whole_model_has_the_loss_of_the_streamed_one",
    Unseeded: "calibration_is_by_seed",
    Training: "a_whole_model_has_the_loss_of_the_streamed_one",
    Averaging: "a_loss_is_a_sum",
    Weighted: "real_tokens_are_told_from_padding",
    Dense: "an_emulator_is_loaded_with_its_layers",
}


@pytest.mark.parametrize("broken", LAWS, ids=lambda family: family.__name__)
def test_a_law_that_is_broken_is_noticed(broken, toy):
    law = getattr(FamilyContract(), f"test_{LAWS[broken]}")
    law(toy)
    other = copy.copy(toy)  # with the same artefacts
    other.family = broken()
    with pytest.raises(AssertionError):
        law(other)


def test_without_pytest_the_rest_of_testing_is_there_and_the_contract_says_what_to_install(
    monkeypatch,
):
    for name in [name for name in sys.modules if name.startswith("emloc.testing")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pytest", None)
    importlib.import_module("emloc.testing")
    importlib.import_module("emloc.testing.toy_family")
    with pytest.raises(ModuleNotFoundError, match="not installed; pip install pytest"):
        importlib.import_module("emloc.testing.contract")
