"""The contract notices families that break it, each in the law that it breaks."""

import copy
import importlib
import inspect
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import CheckpointError
from emloc.extend.family import FamilyEntry
from emloc.testing import FamilyContract
from emloc.testing.contract import Subject
from emloc.testing.contract.family_laws import apart_though_shared
from emloc.testing.toy_family import TRAINING, ToyFamily


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


class AllBlocks(ToyFamily):
    """All blocks as one, whose list is inside of it."""

    def skeleton(self, checkpoint, dtype):
        model = super().skeleton(checkpoint, dtype)
        stack, model.blocks = model.blocks, nn.ModuleList([nn.Sequential(*model.blocks)])
        assert len(stack) == 3
        return model

    def stored(self, model, parameter, checkpoint):
        return super().stored(model, parameter.replace("blocks.0.", "blocks.", 1), checkpoint)


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


class Padded(ToyFamily):
    """Micro-batches that are filled up with pictures of nothing, which its masks leave out."""

    def calibration_batches(self, checkpoint, options):
        batches = super().calibration_batches(checkpoint, options)
        return [self.filled(batch) for batch in batches]

    def filled(self, batch):
        more = 8 - len(batch["labels"]) % 8
        pictures = torch.cat([batch["pictures"], torch.full((more, 3, 6, 6), 9.0)])
        labels = torch.cat([batch["labels"], torch.full((more,), -100)])
        return {"pictures": pictures, "labels": labels}

    def real(self, batch):
        return batch["labels"] >= 0

    def token_mask(self, batch, layer=None):
        return self.real(batch)[:, None, None].expand(-1, 6, 6)


class Maskless(Padded):
    def token_mask(self, batch, layer=None):
        return None


class Halfway(Padded):
    """Leaves padding out of some layers alone."""

    def token_mask(self, batch, layer=None):
        mask = super().token_mask(batch, layer)
        return torch.ones_like(mask) if layer and layer.endswith("down") else mask


class Backwards(Padded):
    """Takes so many rows, from the wrong end."""

    def real(self, batch):
        return super().real(batch).flip(0)


class LooselyTied(ToyFamily):
    """Reads one tensor for two parameters that it does not tie."""

    def stored(self, model, parameter, checkpoint):
        return super().stored(
            model, parameter.replace("blocks.2.norm", "blocks.1.norm"), checkpoint
        )


class TiedLater(ToyFamily):
    """Ties in whole models what its skeleton has twice."""

    def load(self, checkpoint, dtype, device):
        model = super().load(checkpoint, dtype, device)
        model.blocks[2].norm.weight = model.blocks[1].norm.weight
        return model


class Lenient(ToyFamily):
    """Draws what a checkpoint lacks, as libraries do."""

    def load(self, checkpoint, dtype, device):
        try:
            return super().load(checkpoint, dtype, device)
        except CheckpointError:
            return self.skeleton(checkpoint, torch.float32).to_empty(device=device)


class Ctrl(ToyFamily):
    """Trains on after Ctrl-C, and calls that done."""

    def train(self, config, work):
        try:
            return super().train(config, work)
        except KeyboardInterrupt:
            return super().train(config, work)


class Restless(ToyFamily):
    """Draws other numbers each time that it is called."""

    calls = 0

    def train(self, config, work):
        Restless.calls += 1
        return super().train(config.model_copy(update={"seed": Restless.calls}), work)


class Sidelong(ToyFamily):
    """Reads a file beside the data, which it does not name as data."""

    def calibration_batches(self, checkpoint, options):
        beside = sum(
            Checkpoint.open(str(checkpoint.path)).path.parent.joinpath("more").read_bytes()
        )
        return super().calibration_batches(
            checkpoint, options.model_copy(update={"seed": options.seed + beside})
        )


class OneForm(ToyFamily):
    """Rebuilds low-rank layers alone."""

    def load(self, checkpoint, dtype, device):
        groups = checkpoint.config.get("quantization_config", {}).get("groups", [])
        others = any("format" in group for group in groups)
        base = Manifest.find(checkpoint.path).base_model.name_or_path if others else None
        return super().load(Checkpoint.open(base) if base else checkpoint, dtype, device)


class Rolled(ToyFamily):
    """Scores each sample by the label of the one before it."""

    def loss(self, model, batch):
        return super().loss(model, {**batch, "labels": batch["labels"].roll(1)})


class Reversed(ToyFamily):
    def blocks(self, model):
        return super().blocks(model)[::-1]


class FirstAlone(ToyFamily):
    """Names one block of three, and its layers."""

    def blocks(self, model):
        return super().blocks(model)[:1]


class Hoarding(ToyFamily):
    """Keeps the converted weights of every block that ran."""

    def skeleton(self, checkpoint, dtype):
        model = super().skeleton(checkpoint, dtype)
        for block in model.blocks:
            block.register_forward_pre_hook(self.keep)
        return model

    def keep(self, block, inputs):
        block.kept = [parameter.detach().clone() for parameter in block.parameters()]


class Stubborn(ToyFamily):
    """Loads everything in float32."""

    def load(self, checkpoint, dtype, device):
        return super().load(checkpoint, "float32", device)


class Asleep(ToyFamily):
    """Leaves emulators in training mode."""

    def load(self, checkpoint, dtype, device):
        model = super().load(checkpoint, dtype, device)
        return model.train() if "quantization_config" in checkpoint.config else model


class Raw(ToyFamily):
    """Lets through what the library raises."""

    def load(self, checkpoint, dtype, device):
        try:
            return super().load(checkpoint, dtype, device)
        except CheckpointError as problem:
            raise RuntimeError("size mismatch") from problem


def stuck(**options):
    """A family whose training has values of its own for some options, whatever is asked for."""

    class Stuck(ToyFamily):
        def train(self, config, work):
            return super().train(config.model_copy(update=options), work)

    Stuck.__name__ = "Stuck_" + "_".join(options)
    return Stuck


class Careless(ToyFamily):
    """Takes every option, and ignores those that it does not know."""

    def train(self, config, work):
        known = {name: getattr(config, name) for name in config.model_fields_set & TRAINING}
        return super().train(type(config)(**known, device=config.device), work)


class Contrary(ToyFamily):
    """Writes the adapter with the wrong sign."""

    def train(self, config, work):
        figures = super().train(config, work)
        tensors = load_file(work / "adapter_model.safetensors")
        changed = {
            name: -tensor if "lora_B" in name else tensor for name, tensor in tensors.items()
        }
        save_file(changed, work / "adapter_model.safetensors")
        return figures


class Early(ToyFamily):
    """Writes what it had some steps before the end."""

    def train(self, config, work):
        figures = super().train(config, work)
        tensors = load_file(work / "adapter_model.safetensors")
        changed = {name: 0.9 * tensor for name, tensor in tensors.items()}
        save_file(changed, work / "adapter_model.safetensors")
        return figures


class OnTheBase(ToyFamily):
    """Trains on the model that the emulator was made of."""

    def train(self, config, work):
        base = config.emulator and Manifest.read(Path(config.emulator)).base_model.name_or_path
        return super().train(config.model_copy(update={"emulator": base}), work)


class Thorough(ToyFamily):
    """Scores all samples, however few are asked for."""

    def evaluate(self, config):
        return super().evaluate(config.model_copy(update={"num_samples": None}))


class Strict(ToyFamily):
    """Scores by another loss than it trains and chooses by."""

    def evaluate(self, config):
        scores = super().evaluate(config)
        return {**scores, "loss": 1.1 * scores["loss"]}


LAWS = {
    Rolled: "a_loss_is_that_of_each_sample",
    Reversed: "blocks_are_in_the_order_of_the_forward",
    FirstAlone: "modules_like_a_block_beside_it_are_blocks",
    Hoarding: "a_block_is_let_go_when_the_forward_is_through_it",
    Stubborn: "a_model_has_the_dtype_that_is_asked_for",
    Asleep: "an_emulator_is_loaded_as_it_is_stored",
    Raw: "wrong_files_are_one_sentence_and_nothing_is_written",
    stuck(lora_r=3): "a_lora_has_the_shape_that_is_asked_for",
    stuck(lora_alpha=32.0): "a_lora_has_the_shape_that_is_asked_for",
    stuck(use_rslora=False): "a_lora_has_the_shape_that_is_asked_for",
    stuck(lora_target_modules=["all-linear"]): "a_lora_has_the_shape_that_is_asked_for",
    stuck(seed=0): "an_option_of_training_is_obeyed_or_refused[seed]",
    stuck(learning_rate=1e-2): "an_option_of_training_is_obeyed_or_refused[learning_rate]",
    stuck(per_device_train_batch_size=8): (
        "an_option_of_training_is_obeyed_or_refused[per_device_train_batch_size]"
    ),
    stuck(num_train_epochs=1.0): "training_takes_as_many_steps_as_are_asked_for",
    stuck(max_steps=2): "training_takes_as_many_steps_as_are_asked_for",
    Careless: "an_option_of_training_is_obeyed_or_refused[optim]",
    Contrary: "a_lora_lowers_the_loss_of_what_it_learnt",
    Early: "training_takes_as_many_steps_as_are_asked_for",
    stuck(memory=None): "training_takes_as_many_steps_as_are_asked_for",
    OnTheBase: "a_lora_is_trained_on_the_emulator",
    Thorough: "an_evaluation_is_of_the_samples_that_are_asked_for",
    Strict: "an_evaluation_is_by_the_loss_of_the_family",
    AllBlocks: "a_block_is_not_a_stack_of_blocks",
    Maskless: "every_layer_reads_the_real_rows_and_no_others",
    Halfway: "every_layer_reads_the_real_rows_and_no_others",
    Backwards: "every_layer_reads_the_real_rows_and_no_others",
    LooselyTied: "tied_weights_are_one_parameter",
    TiedLater: "tied_weights_are_one_parameter",
    OneForm: "every_installed_format_is_loaded_and_computes",
    Ctrl: "interrupted_training_goes_on_to_the_same_adapter",
    Restless: "interrupted_training_goes_on_to_the_same_adapter",
    Lenient: "a_checkpoint_that_is_not_whole_is_refused",
    Sidelong: "a_changed_data_file_is_other_data",
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


def check(law, subject, folder):
    """Call a law of the contract with what it asks for."""
    law, _, option = law.rstrip("]").partition("[")
    function = getattr(FamilyContract(), f"test_{law}")
    offered = {"tmp_path": folder, "option": option, "dtype": torch.bfloat16}
    asked = inspect.signature(function).parameters
    more = {name: value for name, value in offered.items() if name in asked}
    folder.mkdir()
    function(subject, **more)


def as_family(subject, family, monkeypatch):
    """The subject with its artefacts and another family, which stages open as well."""
    other = copy.copy(subject)
    other.family = family
    for made in ("batches", "checkpoint"):
        vars(other).pop(made, None)
    monkeypatch.setattr(FamilyEntry, "load", lambda entry: family)
    return other


@pytest.mark.parametrize("broken", LAWS, ids=lambda family: family.__name__)
def test_a_law_that_is_broken_is_noticed(broken, toy, tmp_path, monkeypatch):
    if broken is Sidelong:
        beside = Path(toy.example["model_name_or_path"]).parent / "more"
        beside.write_bytes(bytes(range(9)))
    try:
        check(LAWS[broken], toy, tmp_path / "right")
        other = as_family(toy, broken(), monkeypatch)
        with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
            check(LAWS[broken], other, tmp_path / "wrong")
    finally:
        if broken is Sidelong:
            beside.unlink()


class SingleBlock(ToyFamily):
    """A model of one block, whose list is left out of its names."""

    def skeleton(self, checkpoint, dtype):
        model = super().skeleton(checkpoint, dtype)
        model.blocks = model.blocks[:1]
        return model

    def load(self, checkpoint, dtype, device):
        model = super().load(checkpoint, dtype, device)
        model.blocks = model.blocks[:1]
        return model


class Ungrouped(ToyFamily):
    """Shares no factors."""

    def layer_groups(self, model):
        return [[name] for group in super().layer_groups(model) for name in group]


ALLOWED = {
    SingleBlock: (
        "blocks_and_layers", "a_block_is_not_a_stack_of_blocks", "layers_of_a_group_read_one_tensor",
        "streamed_forward_is_the_plain_forward", "every_layer_reads_the_real_rows_and_no_others",
    ),
    Ungrouped: ("layers_of_a_group_read_one_tensor", "blocks_and_layers"),
    Padded: (
        "every_layer_reads_the_real_rows_and_no_others", "real_tokens_are_told_from_padding",
        "calibration_is_by_seed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("allowed", ALLOWED, ids=lambda family: family.__name__)
def test_what_is_unusual_and_right_passes(allowed, toy, tmp_path, monkeypatch):
    other = as_family(toy, allowed(), monkeypatch)
    for law in ALLOWED[allowed]:
        check(law, other, tmp_path / law)


def test_shared_inputs_that_are_no_group_are_warned_of(toy, monkeypatch):
    other = as_family(toy, Ungrouped(), monkeypatch)
    assert apart_though_shared(toy) == []
    assert apart_though_shared(other) == [[f"blocks.{n}.gate", f"blocks.{n}.up"] for n in range(3)]
    with pytest.warns(UserWarning, match=r"no group: \[\['blocks.0.gate', 'blocks.0.up'\]"):
        FamilyContract().test_layers_of_a_module_that_read_one_tensor_are_a_group(other)


def test_exact_layers_and_dense_ones_with_a_lora_pass(toy, tmp_path):
    """An emulator that holds some layers as they are: of no more than the rank that is kept, or dense."""
    model = Path(shutil.copytree(toy.example["model_name_or_path"], tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    for n in range(3):
        down = tensors[f"blocks.{n}.down.weight"]
        down.copy_(down[:, :1] @ down[:1])
    save_file(tensors, model / "model.safetensors")
    example = {**toy.example, "model_name_or_path": str(model)}
    options = {"format": "low_rank", "keep_ratio": 0.5, "exclude": [r"blocks\.1\.gate"]}
    other = Subject("toy", tmp_path / "stages", example, {"compress": options})
    errors = {
        name: entry["relative_error"]
        for entry in Manifest.read(other.emulator).layers.values()
        for name in entry["layers"]
    }
    assert "blocks.1.gate" not in errors
    assert errors["blocks.0.down"] < 1e-4 < errors["blocks.0.conv"]
    for law in ("stages_leave_what_they_promise", "correction_removes_the_residual",
                "merged_weights_are_the_sum", "an_emulator_is_loaded_with_its_layers"):  # fmt: skip
        check(law, other, tmp_path / law)


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
