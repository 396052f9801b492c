"""Discovery: names are unique, misspelt hooks and broken plugins are reported, not fatal."""

import importlib.metadata
import types

import pluggy
import pytest

import emloc
from emloc.errors import ConfigError, PluginError
from emloc.extend import hookspecs
from emloc.extend.family import FamilyEntry
from emloc.extend.methods import Method, MethodEntry
from emloc.extend.plugins import Plugins, add_plugin, family_named, load_plugins, method_named
from emloc.stages.run import plan_stages


def plugin(family="toy", hook="emloc_register_families"):
    module = types.ModuleType(f"plugin_{family}")

    def implementation():
        return [FamilyEntry(family, "a toy", "builtins:object", lambda config: "toy" in config)]

    implementation.__name__ = hook
    setattr(module, hook, emloc.hookimpl(implementation))
    return module


@pytest.fixture
def found():
    plugins = Plugins(pluggy.PluginManager("emloc"))
    plugins.manager.add_hookspecs(hookspecs)
    return plugins


def test_families_are_collected_with_their_plugin(found):
    add_plugin(found, "one", plugin("toy"))
    add_plugin(found, "two", plugin("other"))
    assert {name: entry.plugin for name, entry in found.families.items()} == {
        "toy": "one",
        "other": "two",
    }


def test_a_family_name_is_taken_once(found):
    add_plugin(found, "one", plugin("toy"))
    with pytest.raises(PluginError, match="'toy' is already registered by one"):
        add_plugin(found, "two", plugin("toy"))
    assert found.families["toy"].plugin == "one"
    assert not found.manager.has_plugin("two")


def test_a_misspelt_hook_is_refused(found):
    with pytest.raises(pluggy.PluginValidationError, match="emloc_register_familys"):
        add_plugin(found, "one", plugin(hook="emloc_register_familys"))


def test_a_broken_plugin_is_reported_by_name(monkeypatch):
    class Broken:
        name = "broken"

        def load(self):
            raise ImportError("no module named nothing")

    toy = importlib.metadata.EntryPoint("toys", "emloc.testing.toy_plugin", "emloc")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [toy, Broken()])
    found = load_plugins()
    assert found.broken == {"broken": "ImportError: no module named nothing"}
    assert {name: entry.plugin for name, entry in found.families.items()} == {"toy": "toys"}


def test_a_method_of_another_version_breaks_its_plugin_and_is_named(monkeypatch):
    """What stood in the fourth place were families, which would be taken for what a method needs."""
    module = types.ModuleType("plugin_old")

    def emloc_register_methods():
        return [MethodEntry("old", "a toy", "emloc.methods.emloc:Emloc", ("llm",))]

    module.emloc_register_methods = emloc.hookimpl(emloc_register_methods)
    old = types.SimpleNamespace(name="old", load=lambda: module)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [old])
    assert "positional arguments" in load_plugins().broken["old"]
    broken = r"Plugin old is broken \(TypeError: .*positional arguments"
    with pytest.raises(PluginError, match=broken):
        method_named("old")
    with pytest.raises(PluginError, match=broken):
        family_named("old")
    with pytest.raises(ConfigError, match=rf"unknown key olds\..* {broken}"):
        plan_stages({"output_dir": "o", "merge": {}, "olds": 1}, "run")


def test_an_unknown_family_says_what_to_install():
    with pytest.raises(PluginError, match="pip install emloc-audio"):
        family_named("audio")


def test_methods_are_collected_after_those_of_core(found):
    module = types.ModuleType("plugin_method")

    def emloc_register_methods():
        return [MethodEntry("toy-method", "a toy", "emloc.methods.emloc:Emloc")]

    module.emloc_register_methods = emloc.hookimpl(emloc_register_methods)
    add_plugin(found, "one", module)
    assert list(found.methods) == ["emloc", "emloc-uncorrected", "toy-method"]
    assert found.methods["toy-method"].plugin == "one"
    assert isinstance(found.methods["toy-method"].load(), Method)


def test_a_method_name_is_taken_once_and_nothing_of_the_plugin_stays(found):
    module = plugin("toy")
    module.emloc_register_methods = emloc.hookimpl(_claims_emloc)
    with pytest.raises(PluginError, match="method 'emloc' is already registered by emloc"):
        add_plugin(found, "one", module)
    assert found.families == {}
    assert not found.manager.has_plugin("one")


def emloc_register_methods():
    return [MethodEntry("emloc", "another", "emloc.methods.emloc:Emloc")]


_claims_emloc = emloc_register_methods


def test_an_unknown_method_says_where_the_others_are():
    with pytest.raises(PluginError, match="Did you mean emloc"):
        method_named("emlock")
    with pytest.raises(PluginError, match="emloc-baselines"):
        method_named("zzz")
