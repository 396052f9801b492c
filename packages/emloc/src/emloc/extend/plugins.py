"""Find the installed plugins, and the families, methods, stages and formats that they offer.

A plugin that cannot be imported, or that claims a name that is taken, is reported by name and left out;
the others go on working.
"""

import importlib.metadata
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel

from emloc.config import nearest
from emloc.errors import PluginError
from emloc.extend import hookspecs
from emloc.extend.family import FamilyEntry, ModelFamily
from emloc.extend.methods import CORE_METHODS, MethodEntry
from emloc.extend.option_names import check_options
from emloc.extend.stages import StageEntry
from emloc.formats.layer_format import CORE_FORMATS, FormatEntry

ConfigT = TypeVar("ConfigT", bound=BaseModel)
GROUP = "emloc"


@dataclass
class Plugins:
    """The installed plugins and what they offer.

    Attributes:
        manager: pluggy's manager, for hooks other than the families.
        families: by name.
        methods: by name, core's own first.
        stages: by name, without core's own (`emloc.stages.registry`).
        formats: by name, core's own first.
        broken: plugin name to one sentence on why it was left out.
    """

    manager: pluggy.PluginManager
    families: dict[str, FamilyEntry] = field(default_factory=dict[str, FamilyEntry])
    methods: dict[str, MethodEntry] = field(
        default_factory=lambda: {entry.name: entry.owned_by("emloc") for entry in CORE_METHODS}
    )
    stages: dict[str, StageEntry] = field(default_factory=dict[str, StageEntry])
    formats: dict[str, FormatEntry] = field(
        default_factory=lambda: {entry.name: entry for entry in CORE_FORMATS}
    )
    broken: dict[str, str] = field(default_factory=dict[str, str])

    def said_broken(self) -> str:
        """` Plugin x is broken (why).` for each that is, to follow what is said of a name that is missing."""
        said = (f" Plugin {name} is broken ({why})." for name, why in self.broken.items())
        return "".join(said)


def load_plugins() -> Plugins:
    """Import every plugin module of the entry-point group and collect what it offers."""
    plugins = Plugins(pluggy.PluginManager(GROUP))
    plugins.manager.add_hookspecs(hookspecs)
    places = tuple((place, _changed(place)) for place in sys.path)
    for entry in _entries(importlib.metadata.entry_points, places):
        try:
            add_plugin(plugins, entry.name, entry.load())
        except Exception as problem:  # a third party's import may raise anything
            plugins.broken[entry.name] = f"{type(problem).__name__}: {problem}"
    return plugins


@lru_cache(maxsize=1)
def _entries(
    find: Callable[..., Any], places: tuple[tuple[str, int | None], ...]
) -> Sequence[importlib.metadata.EntryPoint]:
    """The group's entry points by name.

    Reading those of every installed package takes longer than all else here, and stages load the plugins
    several times: they are read again where a folder of the path is another one or has changed, as it does
    when something is installed or removed.
    """
    return sorted(find(group=GROUP), key=lambda entry: entry.name)


def _changed(place: str) -> int | None:
    try:
        return os.stat(place or os.curdir).st_mtime_ns
    except OSError:  # it is not there, or not a name
        return None


def add_plugin(plugins: Plugins, name: str, module: Any) -> None:
    """Register one plugin module.

    Raises:
        PluginError: a hook that does not exist, a name of a family, method, stage or format that is taken, an
            option that cannot stand beside the others, or a plugin registered twice.
    """
    manager = plugins.manager
    try:
        manager.register(module, name=name)
        manager.check_pending()
        others = [other for other in manager.get_plugins() if other is not module]
        [families] = manager.subset_hook_caller("emloc_register_families", others)() or [[]]
        [methods] = manager.subset_hook_caller("emloc_register_methods", others)() or [[]]
        [stages] = manager.subset_hook_caller("emloc_register_stages", others)() or [[]]
        [formats] = manager.subset_hook_caller("emloc_register_formats", others)() or [[]]
        _refuse_taken("family", families, plugins.families)
        _refuse_taken("method", methods, plugins.methods)
        _refuse_taken("stage", stages, plugins.stages)
        _refuse_taken("format", formats, plugins.formats)
        check_options(families, plugins.families.values())
        plugins.families.update({entry.name: entry.owned_by(name) for entry in families})
        plugins.methods.update({entry.name: entry.owned_by(name) for entry in methods})
        plugins.formats.update({entry.name: entry.owned_by(name) for entry in formats})
        plugins.stages.update({entry.name: entry.owned_by(name) for entry in stages})
    except Exception:
        if manager.get_plugin(name) is module:
            manager.unregister(module)
        raise


def _refuse_taken(
    kind: str,
    entries: Sequence[FamilyEntry | MethodEntry | StageEntry | FormatEntry],
    taken: Mapping[str, FamilyEntry | MethodEntry | StageEntry | FormatEntry],
) -> None:
    for entry in entries:
        if entry.name in taken:
            owner = taken[entry.name].plugin
            raise PluginError(f"{kind} {entry.name!r} is already registered by {owner}")


def family_named(name: str, families: Mapping[str, FamilyEntry] | None = None) -> ModelFamily:
    """The family of that name, imported.

    Raises:
        PluginError: no installed plugin offers it.
    """
    return family_entry(name, load_plugins().families if families is None else families).load()


def family_entry(name: str, known: Mapping[str, FamilyEntry]) -> FamilyEntry:
    """The entry that is registered under a family's name.

    Raises:
        PluginError: nothing is.
    """
    if name not in known:
        raise PluginError(
            f"No installed plugin offers the family {name!r} (installed: "
            f"{', '.join(known) or 'none'}); install its plugin, for example pip install emloc-{name}."
            f"{load_plugins().said_broken()}"
        )
    return known[name]


def method_named(name: str) -> MethodEntry:
    """The method of that name.

    Raises:
        PluginError: no installed plugin offers it.
    """
    plugins = load_plugins()
    known = plugins.methods
    if name not in known:
        raise PluginError(
            f"No installed plugin offers the method {name!r} (installed: {', '.join(known)})."
            f"{nearest(name, list(known)) or ' Compared methods are in emloc-baselines.'}"
            f"{plugins.said_broken()}"
        )
    return known[name]


def families_for(
    method: MethodEntry, families: Mapping[str, FamilyEntry] | None = None
) -> list[str]:
    """Names of the installed families that offer what a method needs."""
    known = load_plugins().families if families is None else families
    needs = set(method.needs)
    return [entry.name for entry in known.values() if needs.issubset(entry.offers)]
