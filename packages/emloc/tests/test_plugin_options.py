"""Options that plugins add: names that two families share, and what is reported instead of breaking."""

import importlib.metadata
import types
from types import SimpleNamespace
from typing import Literal

import pluggy
import pytest
from pydantic import Field

import emloc
from emloc.config import (
    CompressConfig,
    DataOptions,
    EvaluateConfig,
    PlanConfig,
    StageConfig,
    TrainConfig,
    build,
)
from emloc.errors import ConfigError, PluginError
from emloc.extend import hookspecs
from emloc.extend.family import FamilyEntry
from emloc.extend.plugin_options import (
    forget_plugin_options,
    of_family,
    own_options,
    with_plugin_options,
)
from emloc.extend.plugins import Plugins, add_plugin, load_plugins


class SoundOptions(StageConfig):
    """Of a family for sounds."""

    rate: int = Field(16000, ge=1, description="samples per second")
    on_bad_file: Literal["stop", "skip"] = "stop"


class MusicOptions(StageConfig):
    """Of another: the same name and type, another default."""

    rate: int = Field(44100, ge=1, description="of the studio")
    bars: int = 4


def plugin(name, options):
    module = types.ModuleType(f"plugin_{name}")

    def emloc_register_families():
        return [FamilyEntry(name, "a toy", "builtins:object", lambda config: False, options)]

    module.emloc_register_families = emloc.hookimpl(emloc_register_families)
    return module


@pytest.fixture
def found():
    plugins = Plugins(pluggy.PluginManager("emloc"))
    plugins.manager.add_hookspecs(hookspecs)
    add_plugin(plugins, "sound", plugin("sound", {DataOptions: SoundOptions}))
    return plugins


@pytest.fixture
def installed(monkeypatch):
    """Both families beside the real ones."""
    toys = [("music", MusicOptions), ("sound", SoundOptions)]
    real = list(importlib.metadata.entry_points(group="emloc"))
    added = [
        SimpleNamespace(name=name, load=lambda n=name, o=options: plugin(n, {DataOptions: o}))
        for name, options in toys
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [*real, *added])
    forget_plugin_options()
    yield
    monkeypatch.undo()
    forget_plugin_options()


def of(name, config=TrainConfig, **given):
    options = {"output_dir": "o", **given}
    whole = build(with_plugin_options(config), options, "x")
    return of_family(whole, SimpleNamespace(name=name))


def test_each_family_has_its_own_default_under_a_shared_name(installed):
    assert load_plugins().broken == {}
    assert (of("sound").rate, of("music").rate) == (16000, 44100)
    assert of("sound", rate=8000).rate == of("music", rate="8e3").rate == 8000
    assert not hasattr(of("sound"), "bars")
    assert "rate" not in own_options(of("llm"), set())
    assert own_options(of("music"), set())["rate"] == 44100
    assert of("music", max_steps=3).model_fields_set == {"output_dir", "max_steps"}


def test_an_option_of_other_families_alone_is_refused_by_name(installed):
    with pytest.raises(
        ConfigError, match="rate is an option of the family music and sound, but the "
    ):
        of("llm", rate=8000)
    with pytest.raises(ConfigError, match="bars is an option of the family music"):
        of("sound", bars=2)
    with pytest.raises(ConfigError, match="rate = -1"):
        of("sound", rate=-1)
    assert not hasattr(of("sound", bars=4), "bars")  # spelt out, as in a file for all


def test_every_stage_takes_them(installed):
    assert emloc.train.config.model_fields["rate"].annotation is int
    assert of("music", PlanConfig, model_name_or_path="m").rate == 44100


class Float(StageConfig):
    rate: float = 1.0


class Limited(StageConfig):
    rate: int = Field(16000, ge=8)


class Core(StageConfig):
    keep_ratio: float = 0.1


class Required(StageConfig):
    bars: int


class Derived(CompressConfig):
    bars: int = 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({DataOptions: Float}, "its option rate for compress differs in type from that of the family "
                               r"sound \(float, and int with .* there\)"),
        ({TrainConfig: Float}, "its option rate for train differs in type"),
        ({TrainConfig: Limited}, "its option rate for train differs in type"),
        ({DataOptions: Core}, "its option keep_ratio is already an option of compress"),
        ({TrainConfig: Required}, "its option bars for train has no default"),
        ({CompressConfig: Derived}, "derive from CompressConfig"),
    ],
)  # fmt: skip
def test_options_that_cannot_stand_beside_others_leave_their_plugin_out(found, options, message):
    with pytest.raises(PluginError, match=message):
        add_plugin(found, "odd", plugin("odd", options))
    assert list(found.families) == ["sound"]
    assert not found.manager.has_plugin("odd")


def test_one_name_may_be_two_things_in_two_stages(found):
    class Steps(StageConfig):
        bars: int = 3

    class Share(StageConfig):
        bars: float | None = None

    add_plugin(found, "one", plugin("one", {TrainConfig: Steps, EvaluateConfig: Share}))
    assert "one" in found.families
