"""What is given beside a file is what holds."""

import re

import pytest

import emloc
from emloc.config import build
from emloc.errors import ConfigError
from emloc.options.overrides import read_overrides
from emloc.stages.registry import run_stages
from emloc.stages.run import plan_stages

FILE = {
    "model_name_or_path": "m",
    "dataset": "train.jsonl",
    "output_dir": "root",
    "seed": 1,
    "compress": {"keep_ratio": 0.5, "output_dir": "elsewhere"},
    "train": {"max_steps": 300, "seed": 2},
    "evaluate": {"dataset": "test.jsonl"},
}


def plans(*overrides):
    return plan_stages(FILE, "c.yaml", read_overrides(overrides, [*run_stages()]))


def test_an_override_wins_over_every_section_that_has_the_key(capsys):
    made = plans("keep_ratio=0.3", "seed=7", "dataset=other.jsonl")
    assert made["compress"]["keep_ratio"] == 0.3
    assert {made["compress"]["seed"], made["train"]["seed"]} == {7}
    assert {options["dataset"] for options in made.values()} == {"other.jsonl"}
    said = capsys.readouterr().err
    assert "keep_ratio=0.3 instead of the file's 0.5 in compress" in said
    assert "dataset=other.jsonl instead of the file's test.jsonl in evaluate" in said


@pytest.mark.parametrize("order", [1, -1])
def test_an_override_of_a_stage_wins_over_that(order):
    made = plans(*["seed=7", "train.seed=8"][::order])
    assert (made["compress"]["seed"], made["train"]["seed"]) == (7, 8)
    made = plans(*["dataset=a.jsonl", "evaluate.dataset=b.jsonl"][::order])
    assert (made["train"]["dataset"], made["evaluate"]["dataset"]) == ("a.jsonl", "b.jsonl")


def test_keys_at_the_top_of_a_file_stay_defaults():
    made = plans()
    assert (made["compress"]["seed"], made["train"]["seed"]) == (1, 2)
    assert made["compress"]["output_dir"] == "elsewhere"


def test_the_folder_of_the_run_is_that_of_every_stage():
    made = plans("output_dir=007")
    assert [str(options["output_dir"]) for options in made.values()] == [
        "007/emulator", "007/adapter", "007/evaluation",
    ]  # fmt: skip
    assert plans("output_dir=x", "train.output_dir=y")["train"]["output_dir"] == "y"


def test_a_stage_more():
    assert list(plans("merge=")) == ["compress", "train", "merge", "evaluate"]
    assert plans("merge={memory: 1GiB}")["merge"]["memory"] == "1GiB"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("keep_ration=0.3", "no stage of this run takes keep_ration. Did you mean keep_ratio?"),
        (
            "limit=1",
            "no stage of this run takes limit. It is an option of correct, which does not run",
        ),
        ("train.keep_ratio=0.3", "train: unknown option keep_ratio. It is one of compress."),
        ("trian.seed=1", "no stage trian. Did you mean train?"),
        ("train.seed.x=1", "no stage train.seed."),
        ("train=3", "train is a stage; write train.option=value."),
        ("seed", "should read key=value"),
        ("=1", "should read key=value"),
        ("--seed=1", "should read key=value"),
    ],
)
def test_an_override_that_nothing_takes_is_a_mistake(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        plans(override)


def test_texts_that_yaml_would_turn_into_something_else():
    options = {"output_dir": "o", "model_name_or_path": "m", "correct": {}, "train": {}}
    given = ["dataset=2024-01-05", "lora_r=010", "learning_rate=1e-3", "limit=none",
             "lora_target_modules=[q_proj,v_proj]", "single_file_config=null", "optim=sgd", "seed=1e3",
             "use_dora=off", "adapter=a", "emulator=[e] x"]  # fmt: skip
    made = plan_stages(options, "x", read_overrides(given, [*run_stages()]))
    train = build(run_stages()["train"].config, made["train"], "train")
    assert (train.dataset, train.optim, train.single_file_config) == ("2024-01-05", "sgd", None)
    assert (train.lora_r, train.learning_rate, train.seed, train.use_dora) == (
        10,
        0.001,
        1000,
        False,
    )
    assert train.lora_target_modules == ["q_proj", "v_proj"]
    assert train.emulator == "[e] x"
    assert build(run_stages()["correct"].config, made["correct"], "correct").limit == "none"


def test_numbers_for_options_that_are_text():
    given = {**FILE, "output_dir": 2024, "train": {"dataset": 7, "emulator": True}}
    train = plan_stages(given, "x")["train"]
    assert (train["output_dir"], train["dataset"], train["emulator"]) == (
        "2024/adapter",
        "7",
        "true",
    )


def test_everything_is_checked_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, section, message in [
        ("evaluate", {"dataset": None}, "dataset is required"),
        ("correct", {"dataset": None}, "limit=auto compares limits on data"),
        ("train", {"report_to": "trackr"}, "there is no tracker trackr. Did you mean trackio?"),
        ("train", {"lr_scheduler_type": "cosin"}, "Did you mean cosine?"),
        ("train", {"optim": "adamw_8bit", "device": "cpu"}, "optim=adamw_8bit needs a GPU"),
        ("train", {"max_steps": 0}, "max_steps = 0"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(message)):
            emloc.run({**FILE, name: section})
    assert list(tmp_path.iterdir()) == []


def test_no_folder_is_no_folder_called_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for nothing in (None, "", " "):
        with pytest.raises(ConfigError, match="output_dir is required"):
            emloc.run({**FILE, "output_dir": nothing})
