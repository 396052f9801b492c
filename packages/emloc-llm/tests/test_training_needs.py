"""Names that transformers knows, compared with its own; what is not installed is said before any work."""

import importlib.util
import json
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from transformers import SchedulerType, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import emloc
from emloc.artefacts.manifest import MANIFEST_NAME
from emloc.config import TrainConfig
from emloc.errors import ConfigError, DependencyError, EmlocError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers.lora_training import on_one_card, training_arguments
from emloc.options.types import Scheduler
from emloc.stages.training_needs import TRACKERS, check_trackers


def config(**options):
    return with_plugin_options(TrainConfig)(output_dir="o", device="cpu", **options)


def test_the_trackers_are_those_of_transformers():
    assert TRACKERS.keys() == INTEGRATION_TO_CALLBACK.keys()


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK))
def test_a_tracker_that_is_not_installed_is_said_by_name(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(EmlocError, match=f"report_to={name} ") as problem:
        check_trackers(config(report_to=name))
    assert isinstance(problem.value, DependencyError) or name == "kubeflow"
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: module)
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://here")
    check_trackers(config(report_to=name))


@pytest.mark.parametrize("given", ["none", "all", [], None])
def test_none_and_all_as_transformers_takes_them(given, tmp_path):
    options = {} if given is None else {"report_to": given}
    check_trackers(config(**options))
    if given != "all":
        arguments = training_arguments(TrainingArguments, config(**options), tmp_path)
        assert arguments.report_to == []
    with pytest.raises(ConfigError, match="none must be alone"):
        check_trackers(config(report_to="none,wandb"))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("wanbd", "wandb"), ("tensorbord", "tensorboard"), ("zzz", "azure_ml, clearml")],
)
def test_a_misspelt_tracker(name, hint):
    with pytest.raises(ConfigError, match=f"there is no tracker {name}.*{hint}"):
        check_trackers(config(report_to=name))


def test_every_family_refuses_before_its_model_is_read(tmp_path):
    with pytest.raises(ConfigError, match="there is no tracker wanbd"):
        emloc.train(model_name_or_path="no/model", dataset="none", output_dir=tmp_path / "x",
                    report_to="wanbd")  # fmt: skip


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_every_schedule_that_is_offered_runs(name, tiny, tmp_path):
    assert name in [kind.value for kind in SchedulerType]
    folder = emloc.train(output_dir=tmp_path / "a", **{
        **tiny.train_options, "max_steps": 2, "lr_scheduler_type": name, "logging_steps": 1,
    })  # fmt: skip
    log = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]


def test_an_emulator_is_passed_as_one(tiny, tmp_path):
    options = {**tiny.train_options, "emulator": None, "model_name_or_path": str(tiny.emulator)}
    with pytest.raises(ConfigError, match="is an emulator; pass it as emulator"):
        emloc.train(output_dir=tmp_path / "x", **options)


def test_gradient_checkpointing_changes_no_weight(tiny, tmp_path, capfd):
    """So it is no part of the settings: an interrupted run goes on with it."""
    options = {**tiny.train_options, "max_steps": 3, "lora_dropout": 0.3, "learning_rate": 1e-2}
    plain = emloc.train(output_dir=tmp_path / "a", **options)
    other = emloc.train(output_dir=tmp_path / "b", **options, gradient_checkpointing=True)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (plain, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name
    settings = [json.loads((f / MANIFEST_NAME).read_text())["settings"] for f in (plain, other)]
    assert settings[0] == settings[1]
    capfd.readouterr()
    emloc.train(output_dir=tmp_path / "a", **options, gradient_checkpointing=True)
    assert "complete already" in capfd.readouterr().err


def test_more_samples_than_there_are_is_said(tiny, tmp_path, capfd):
    emloc.compress(output_dir=tmp_path / "e", **{
        "model_name_or_path": str(tiny.base), "dataset": str(tiny.data), "max_length": 96,
        "num_calibration_samples": 1000,
    })  # fmt: skip
    assert "not num_calibration_samples=1000" in capfd.readouterr().err


@pytest.mark.parametrize(("device", "card"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_training_takes_the_card_that_was_asked_for_and_no_other(
    device, card, tmp_path, monkeypatch
):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    on_one_card(arguments, device)
    assert (arguments.device, arguments.n_gpu) == (torch.device(card), 1)
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
    assert chosen == [torch.device(card)]
