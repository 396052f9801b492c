"""Names that no disk can have are refused by every option that names something on one, in every stage."""

from pathlib import Path

import pytest

from emloc.errors import ConfigError
from emloc.extend.plugin_options import with_plugin_options
from emloc.extend.plugins import load_plugins
from emloc.options.build import build
from emloc.options.marks import NamesData, NamesFiles
from emloc.stages.registry import all_stages

LOCATED = {"model_name_or_path", "adapter", "emulator", "single_file_config"}
STAGES = all_stages(load_plugins())


def names_something(name, field):
    marks = any(isinstance(mark, (NamesFiles, NamesData)) for mark in field.metadata)
    return marks or name in LOCATED or Path.__name__ in str(field.annotation)


@pytest.mark.parametrize("stage", STAGES)
def test_no_option_takes_a_name_of_300_bytes(stage):
    kind = with_plugin_options(STAGES[stage].config)
    fields = kind.model_fields.items()
    required = {name: "given" for name, field in fields if field.is_required()}
    asked = [name for name, field in fields if names_something(name, field)]
    assert asked
    for name in asked:
        with pytest.raises(ConfigError, match=rf"{name}.* a name of 300 bytes"):
            build(kind, {**required, name: "x" * 300}, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_no_option_takes_a_number_that_no_machine_computes_with(stage):
    kind = with_plugin_options(STAGES[stage].config)
    fields = kind.model_fields.items()
    required = {name: "given" for name, field in fields if field.is_required()}
    for name in (name for name, field in fields if field.annotation is int):
        with pytest.raises(ConfigError, match=name):
            build(kind, {**required, name: 10**400}, stage)


def test_nor_does_a_list_or_a_mapping_hold_one():
    given = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    kind = with_plugin_options(STAGES["train"].config)
    for name, value in {
        "lora_rank_pattern": {"q": 10**400},
        "lora_layers_to_transform": [10**400],
    }.items():
        assert name in kind.model_fields
        with pytest.raises(ConfigError, match=name):
            build(kind, {**given, name: value}, "train")


def test_a_list_of_data_has_an_end():
    given = {"model_name_or_path": "m", "output_dir": "o"}
    kind = with_plugin_options(STAGES["train"].config)
    build(kind, {**given, "dataset": ",".join(f"{n}.jsonl" for n in range(900))}, "train")
    with pytest.raises(ConfigError, match="it names 60,000 files; at most 1,000 are allowed"):
        build(kind, {**given, "dataset": ["0"] * 60_000}, "train")
