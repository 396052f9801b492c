import inspect
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

import emloc
from emloc.config import (
    CompressConfig,
    CorrectConfig,
    EvaluateConfig,
    PlanConfig,
    TrainConfig,
    build,
)
from emloc.errors import ConfigError
from emloc.stages.run import plan_stages


def test_unknown_option_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown option keep_ration\. Did you mean keep_ratio\?"
    ):
        emloc.compress(model_name_or_path="m", output_dir="o", keep_ration=0.4)


@pytest.mark.parametrize("ratio", [0, -1, 1.01, float("nan"), "half"])
def test_keep_ratio_out_of_range(ratio):
    with pytest.raises(ConfigError, match="keep_ratio = "):
        build(
            CompressConfig, {"model_name_or_path": "m", "output_dir": "o", "keep_ratio": ratio}, "x"
        )


def test_missing_option_says_what_it_is():
    with pytest.raises(ConfigError, match="model_name_or_path is required"):
        build(CompressConfig, {"output_dir": "o"}, "x")


def test_text_from_a_command_line_is_parsed():
    config = build(
        TrainConfig,
        {"output_dir": "o", "lora_target_modules": "q_proj,v_proj", "lora_r": "8",
         "lora_rank_pattern": "q_proj=4,v_proj=2", "lora_alpha_pattern": '{"q": "8"}'},
        "x",
    )  # fmt: skip
    assert config.lora_target_modules == ["q_proj", "v_proj"]
    assert (config.lora_r, config.lora_rank_pattern) == (8, {"q_proj": 4, "v_proj": 2})
    assert config.lora_alpha_pattern == {"q": 8}


@pytest.mark.parametrize(
    ("given", "parsed"), [("auto", "auto"), ("none", "none"), (None, "none"), ("3", 3.0), (0, 0.0)]
)
def test_limit(given, parsed):
    options = {"adapter": "a", "emulator": "e", "output_dir": "o", "limit": given}
    assert build(CorrectConfig, options, "x").limit == parsed


def test_stage_functions_show_their_keywords():
    parameters = inspect.signature(emloc.compress).parameters
    assert parameters["format"].default == "auto"
    assert parameters["keep_ratio"].default is None
    assert "share of each layer" in emloc.compress.__doc__


PLAN = {
    "model_name_or_path": "m",
    "dataset": "train.jsonl",
    "output_dir": "root",
    "compress": {"keep_ratio": 0.5},
    "train": {"max_steps": 3},
    "correct": None,
    "merge": {},
    "evaluate": {"dataset": "test.jsonl"},
}


def test_stages_feed_each_other():
    plans = plan_stages(PLAN, "c.yaml")
    assert list(plans) == ["compress", "train", "correct", "merge", "evaluate"]
    assert plans["train"]["emulator"] == "root/emulator"
    assert "model_name_or_path" not in plans["train"]
    assert plans["correct"]["adapter"] == "root/adapter"
    assert plans["merge"]["adapter"] == plans["evaluate"]["adapter"] == "root/corrected"
    assert plans["evaluate"]["dataset"] == "test.jsonl"


def test_an_override_never_reaches_a_stage_that_does_not_know_it():
    plans = plan_stages({**PLAN, "lora_r": 4}, "c.yaml")
    assert plans["train"]["lora_r"] == 4
    assert "lora_r" not in plans["compress"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_ration": 1}, r"unknown key keep_ration\. Did you mean keep_ratio\?"),
        ({"trian": {}}, r"unknown key trian\. Did you mean train\?"),
        (
            {"train": {"lora_rr": 1}},
            r"c.yaml: train: unknown option lora_rr\. Did you mean lora_r\?",
        ),
        ({"train": [1]}, "train should hold keys and values"),
    ],
)
def test_unknown_yaml_keys(change, message):
    with pytest.raises(ConfigError, match=message):
        plan_stages({**PLAN, **change}, "c.yaml")


@pytest.mark.parametrize(
    "config", [CompressConfig, TrainConfig, CorrectConfig, EvaluateConfig, PlanConfig]
)
def test_every_choice_can_be_made_in_text(config):
    """As a command line gives it: one of a few numbers is a number, whatever it was typed as."""
    required = {name: "x" for name, field in config.model_fields.items() if field.is_required()}
    choices = {name: _literals(field.annotation) for name, field in config.model_fields.items()}
    for name, values in choices.items():
        for value in values:
            made = build(config, {**required, name: str(value)}, "here")
            assert getattr(made, name) in (value, [value]), name
    if config is CompressConfig:
        assert choices["bits"] == [1, 2, 3, 4, 8]
        with pytest.raises(ConfigError, match="bits = 5: input should be 1, 2, 3, 4 or 8"):
            build(config, {**required, "bits": "5"}, "here")


def _literals(annotation):
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [value for part in get_args(annotation) for value in _literals(part)]


def test_auto_is_no_candidate_of_auto():
    options = {"adapter": "a", "emulator": "e", "output_dir": "o"}
    assert build(CorrectConfig, {**options, "limit_candidates": "0,none"}, "here").limit_candidates
    with pytest.raises(ConfigError, match="limit_candidates"):
        build(CorrectConfig, {**options, "limit_candidates": "0,auto"}, "here")


def test_what_a_stage_returned_is_taken_by_the_next():
    """A path is a name, alone and in a list."""
    named = {"adapter": Path("a"), "emulator": Path("e"), "dataset": [Path("x.jsonl"), "y.jsonl"]}
    config = build(CorrectConfig, {"output_dir": "o", **named}, "correct")
    assert (config.adapter, config.emulator) == ("a", "e")
    assert config.dataset == "x.jsonl,y.jsonl"
    assert config.output_dir == Path("o")
