"""The optimiser is the one that was named, resumes exactly, and is refused where it cannot run."""

import importlib.util
import json

import pytest
import torch
from prodigyopt import Prodigy
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

import emloc
from emloc.config import TrainConfig
from emloc.errors import ConfigError, DependencyError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.transformers.optimizers import (
    set_optimizer,
    trainers_name,
    warn_of_slow_learning,
)
from emloc.integrations.transformers.training import Progression
from emloc.stages.training_needs import check_optimizer

NAME = "adapter_model.safetensors"


class Small(nn.Module):
    """Two parameters, named as those of a LoRA are."""

    def __init__(self):
        super().__init__()
        self.lora_A = nn.ModuleDict({"default": nn.Linear(5, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, 4, bias=False)})


def trainer_of(tmp_path, model, **options):
    config = with_plugin_options(TrainConfig)(output_dir=tmp_path / "o", **options)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", weight_decay=config.weight_decay,
        learning_rate=config.learning_rate, **trainers_name(config),
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments)
    set_optimizer(trainer, config)
    trainer.create_optimizer()
    return trainer


def test_prodigy_is_that_of_its_authors(tmp_path):
    """The same steps as their class with the settings of diffusers' scripts."""
    ours, theirs = Small(), Small()
    theirs.load_state_dict(ours.state_dict())
    trainer = trainer_of(tmp_path, ours, optim="prodigy", learning_rate=1.0, weight_decay=0.02)
    reference = Prodigy(
        theirs.parameters(), lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.02,
        decouple=True, use_bias_correction=True, safeguard_warmup=True,
    )  # fmt: skip
    for _ in range(5):
        x = torch.randn(7, 5)
        for model, optimizer in ((ours, trainer.optimizer), (theirs, reference)):
            optimizer.zero_grad()
            hidden = model.lora_A["default"](x)
            (model.lora_B["default"](hidden) - x[:, :4]).square().sum().backward()
            optimizer.step()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name))


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd"])
def test_transformers_names_reach_the_trainer(tmp_path, optim):
    kind, options = Trainer.get_optimizer_cls_and_kwargs(
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim=optim)
    )
    made = trainer_of(tmp_path, Small(), optim=optim).optimizer
    assert type(made) is kind
    assert made.defaults.get("fused") == options.get("fused")


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_loraplus_is_over_any_and_decays(tmp_path, optim):
    model = Small()
    optimizer = trainer_of(
        tmp_path, model, optim=optim, loraplus_lr_ratio=8, learning_rate=0.01, weight_decay=0.5
    ).optimizer
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found[id(model.lora_A["default"].weight)] == (0.01, 0.5)
    assert found[id(model.lora_B["default"].weight)] == (0.08, 0.5)
    assert type(optimizer).__name__ == {"adafactor": "Adafactor"}.get(optim, "AdamW")


def test_an_interrupted_run_resumes_exactly(tiny, tmp_path, monkeypatch):
    options = {**tiny.train_options, "optim": "prodigy", "learning_rate": 1.0, "lora_dropout": 0.2}
    whole = emloc.train(output_dir=tmp_path / "whole", **options)
    original = Progression.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progression, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt):
        emloc.train(output_dir=tmp_path / "cut", **options)
    monkeypatch.setattr(Progression, "on_step_end", original)
    resumed = emloc.train(output_dir=tmp_path / "cut", **options)
    assert (resumed / NAME).read_bytes() == (whole / NAME).read_bytes()
    # It did learn, and otherwise than AdamW.
    ups = {k: t for k, t in load_file(whole / NAME).items() if "lora_B" in k}
    assert all(bool(t.any()) for t in ups.values())
    plain = load_file(tiny.adapter / NAME)
    assert not any(torch.equal(t, plain[k]) for k, t in ups.items())
    log = [json.loads(line) for line in (whole / "trainer_log.jsonl").read_text().splitlines()]
    assert len([entry for entry in log if "loss" in entry]) == 6


def test_a_low_rate_of_prodigy_is_said(tmp_path, capsys):
    def said(rate):
        config = with_plugin_options(TrainConfig)(
            output_dir=tmp_path, optim="prodigy", learning_rate=rate
        )
        warn_of_slow_learning(config)
        return " ".join(capsys.readouterr().err.split())

    assert "low for Prodigy" in said(2e-4)
    assert "low for Prodigy" not in said(1.0)


def test_what_cannot_run_is_refused_before_any_work(tiny, tmp_path, monkeypatch):
    def train(**more):
        emloc.train(output_dir=tmp_path / "x", **{**tiny.train_options, **more})

    for name in ("adamw_8bit", "paged_adamw_8bit"):
        with pytest.raises(ConfigError, match=f"optim={name} needs a GPU"):
            train(optim=name)
    with pytest.raises(ConfigError, match="one learning rate for all"):
        train(optim="prodigy", loraplus_lr_ratio=4)
    with pytest.raises(ConfigError, match="optim = 'adam'"):
        train(optim="adam")
    original = importlib.util.find_spec
    missing = {"prodigyopt", "bitsandbytes"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else original(name)
    )
    with pytest.raises(DependencyError, match="pip install prodigyopt"):
        train(optim="prodigy")
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.partial").exists()


def test_eight_bits_are_asked_of_bitsandbytes(tmp_path, monkeypatch):
    """Where there is a GPU and the package, the name reaches the trainer, which knows it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = with_plugin_options(TrainConfig)(
        output_dir=tmp_path, optim="adamw_8bit", device="cuda"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install bitsandbytes"):
        check_optimizer(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    check_optimizer(config)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **trainers_name(config))
    assert arguments.optim == OptimizerNames.ADAMW_8BIT
