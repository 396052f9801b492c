"""A new stage is one file: its declaration puts it on the command line and into a run."""

import importlib.metadata
import shutil
import sys
import types
from pathlib import Path

import pluggy
import pytest
import typer
from pydantic import Field

import emloc
from emloc.artefacts.kinds import ADAPTER, BASE, EMULATOR
from emloc.artefacts.output_place import has_place
from emloc.cli import app, build_app
from emloc.config import DataOptions, StageConfig
from emloc.errors import ConfigError
from emloc.extend.family import FamilyEntry
from emloc.extend.plugins import Plugins, load_plugins
from emloc.extend.stages import COMMANDS, StageEntry
from emloc.integrations.transformers.text_options import LengthOptions
from emloc.options.overrides import read_overrides
from emloc.stages.registry import all_stages, core_stages, run_stages
from emloc.stages.run import plan_stages
from emloc.stages.stage import stage


class DuplicateConfig(StageConfig):
    """Copy an emulator."""

    emulator: str = Field(description="emulator to copy")
    output_dir: Path = Field(description="where the copy goes")


@stage(DuplicateConfig, check=has_place, consumes={"emulator": EMULATOR}, produces=EMULATOR)
def duplicate(config):
    """Copy an emulator; returns the copy's folder."""
    return Path(shutil.copytree(config.emulator, config.output_dir))


@stage(DuplicateConfig, consumes={"emulator": EMULATOR})
def methods(config):
    """A stage under the name of a command."""


class Installed:
    """A plugin's entry point."""

    name = "toys"

    def __init__(self, *entries):
        self.module = types.ModuleType("toy_stages")
        self.module.duplicate, self.module.methods = duplicate, methods

        def emloc_register_stages():
            return list(entries)

        self.module.emloc_register_stages = emloc.hookimpl(emloc_register_stages)

    def load(self):
        return self.module


def install(monkeypatch, *entries):
    plugin = Installed(*entries)
    real = importlib.metadata.entry_points
    monkeypatch.setitem(sys.modules, "toy_stages", plugin.module)
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda group: [*real(group=group), *([plugin] if group == "emloc" else [])],
    )


@pytest.fixture
def installed(monkeypatch):
    install(monkeypatch, StageEntry("duplicate", "toy_stages:duplicate"))


RUN = {"model_name_or_path": "m", "dataset": "d", "output_dir": "root",
       "compress": {}, "duplicate": {}, "train": {}, "correct": {"limit": 1}}  # fmt: skip


def test_it_stands_between_what_makes_and_what_reads_its_kind(installed):
    assert list(run_stages()) == [
        "compress", "duplicate", "train", "correct", "polish", "merge", "evaluate"]  # fmt: skip
    plans = plan_stages(RUN, "c.yaml")
    assert list(plans) == ["compress", "duplicate", "train", "correct"]
    assert plans["duplicate"] == {"emulator": "root/emulator", "output_dir": "root/duplicate"}
    assert plans["train"]["emulator"] == plans["correct"]["emulator"] == "root/duplicate"
    assert "model_name_or_path" not in plans["train"]


def test_what_the_file_names_is_the_start_and_what_a_stage_made_of_it_goes_on(installed):
    without = {name: value for name, value in RUN.items() if name != "compress"}
    plans = plan_stages({**without, "emulator": "mine"}, "c.yaml")
    assert plans["duplicate"]["emulator"] == "mine"
    assert plans["train"]["emulator"] == plans["correct"]["emulator"] == "root/duplicate"
    others = {name: value for name, value in without.items() if name != "duplicate"}
    assert plan_stages({**others, "emulator": "mine"}, "c.yaml")["train"]["emulator"] == "mine"


def test_a_run_knows_its_options(installed):
    plans = plan_stages(RUN, "c.yaml", read_overrides(["duplicate.emulator=e"], [*run_stages()]))
    assert plans["duplicate"]["emulator"] == "e"
    with pytest.raises(
        ConfigError, match=r"duplicate: unknown option emulater\. Did you mean emul"
    ):
        plan_stages({**RUN, "duplicate": {"emulater": "e"}}, "c.yaml")


def test_it_is_a_command(installed):
    build_app(load_plugins())
    command = typer.main.get_command(app).commands["duplicate"]
    assert {"emulator", "output_dir"} <= {parameter.name for parameter in command.params}
    assert command.help == "Copy an emulator."


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (StageEntry("gone", "toy_stages:gone"), "has no attribute 'gone'"),
        (
            StageEntry("compress", "emloc.stages.compress:compress"),
            "'compress' is registered already",
        ),
        (StageEntry("plain", "shutil:rmtree"), "is not a stage"),
        (StageEntry("methods", "toy_stages:methods"), "'methods' has the name of a command"),
    ],
)
def test_a_broken_one_is_reported_and_left_out(monkeypatch, entry, why):
    install(monkeypatch, entry)
    plugins = load_plugins()
    assert list(all_stages(plugins)) == list(core_stages())
    assert why in plugins.broken["toys"]


def test_cores_own_are_in_the_order_of_the_method():
    assert [name for name, each in core_stages().items() if each.produces] == [
        "compress", "train", "correct", "polish", "merge", "evaluate"]  # fmt: skip
    names = list(core_stages())
    assert (names[0], names[-3:]) == ("plan", ["evaluate", "verify", "demo"])


def test_names_of_commands_are_those_of_the_command_line():
    build_app(Plugins(pluggy.PluginManager("emloc")))
    names = {command.name for command in app.registered_commands}
    assert names - set(core_stages()) >= set(COMMANDS)
    assert COMMANDS == ("run", "families", "methods", "new-family")


class Learnt(DataOptions):
    """Options of a stage that has one which families add as well."""

    output_dir: Path = Path()
    max_length: float = 0.5


def test_a_familys_option_of_the_same_name_is_reported(monkeypatch):
    @stage(Learnt, produces=EMULATOR)
    def duplicate(config):
        """A stage of data."""

    reader = FamilyEntry("reader", "a toy", "builtins:object", lambda config: False,
                         {DataOptions: LengthOptions})  # fmt: skip
    plugins = Plugins(pluggy.PluginManager("emloc"))
    plugins.families["reader"] = reader
    plugins.stages["duplicate"] = StageEntry("duplicate", "toy_stages:duplicate", "toys")
    monkeypatch.setitem(sys.modules, "toy_stages", types.SimpleNamespace(duplicate=duplicate))
    assert list(all_stages(plugins)) == list(core_stages())
    assert (
        "duplicate has the option max_length, which the family reader adds"
        in (plugins.broken["toys"])
    )


def test_a_stage_cannot_make_what_comes_before_what_it_takes():
    with pytest.raises(ValueError, match="takes adapter as emulator and makes model"):
        stage(DuplicateConfig, consumes={"emulator": ADAPTER}, produces=BASE)(lambda config: None)
