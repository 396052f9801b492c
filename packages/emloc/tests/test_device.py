"""`auto` and names of devices are resolved in one place; the machine is told what to say."""

import pytest
import torch

import emloc
from emloc import config as configs
from emloc.config import PlanConfig, TrainConfig, build
from emloc.errors import ConfigError
from emloc.machine.device import device_here, planned_device

STAGES = ["compress", "train", "correct", "evaluate", "plan", "demo"]


@pytest.fixture
def cards(monkeypatch):
    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


@pytest.mark.parametrize("stage", STAGES)
def test_auto_is_the_default_of_every_stage(stage):
    options = getattr(configs, f"{stage.capitalize()}Config").model_fields
    assert options["device"].default == "auto"


@pytest.mark.parametrize(("count", "device"), [(0, "cpu"), (1, "cuda"), (4, "cuda")])
def test_auto_is_cuda_where_there_is_one(cards, count, device):
    cards(count)
    assert device_here("auto") == planned_device("auto") == device
    assert build(TrainConfig, {"output_dir": "o"}, "x").device == device
    assert build(PlanConfig, {"model_name_or_path": "m"}, "x").device == device


@pytest.mark.parametrize(
    ("count", "name", "message"),
    [
        (0, "cuda", "finds no CUDA device"),
        (0, "cuda:7", "finds no CUDA device"),
        (1, "cuda:7", "torch finds cuda:0"),
        (2, "cuda:2", "torch finds cuda:0 to cuda:1"),
        (1, "cude", r"Did you mean cuda\?$"),
        (1, "mps", "stages do not run on mps"),
        (1, "0", "expected auto, cpu, cuda or cuda:1"),
        (1, "", "expected auto"),
        (1, "cuda:-1", "expected auto"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_any_work(
    cards, count, name, message, tmp_path
):
    cards(count)
    options = {
        "compress": {"model_name_or_path": "no/model", "output_dir": tmp_path / "o"},
        "train": {"output_dir": tmp_path / "o"},
        "correct": {"adapter": "a", "emulator": "e", "output_dir": tmp_path / "o"},
        "evaluate": {"model_name_or_path": "no/model"},
        "demo": {"output_dir": tmp_path / "o"},
    }
    for stage, given in options.items():
        with pytest.raises(ConfigError, match=message):
            getattr(emloc, stage)(**given, device=name)
    assert list(tmp_path.iterdir()) == []


def test_here_are_the_cpu_and_every_card(cards):
    cards(2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert device_here(name) == name
    assert device_here("cpu:0") == "cpu"
    assert (
        build(TrainConfig, {"output_dir": "o", "device": torch.device("cuda", 1)}, "x").device
        == "cuda:1"
    )


def test_a_plan_may_be_for_a_card_elsewhere(cards):
    cards(0)
    assert planned_device("cuda") == "cuda"
    with pytest.raises(ConfigError, match="Did you mean cuda"):
        emloc.plan(model_name_or_path="no/model", device="cude")
