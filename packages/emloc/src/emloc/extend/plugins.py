"""Find the installed plugins, and the families, methods, stages and formats that they offer.

A plugin that cannot be imported, or that claims a name that is taken, is reported by name and left out;
the others go on working.
"""

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pluggy
from pydantic import BaseModel

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import nearest
from emloc.errors import CheckpointError, PluginError
from emloc.extend import hookspecs
from emloc.extend.capabilities import native_of
from emloc.extend.family import FamilyEntry, ModelFamily
from emloc.extend.methods import CORE_METHODS, MethodEntry
from emloc.extend.option_names import check_options
from emloc.extend.single_file import model_folder
from emloc.extend.stages import StageEntry
from emloc.formats.layer_format import CORE_FORMATS, FormatEntry

ConfigT = TypeVar("ConfigT", bound=BaseModel)
GROUP = "emloc"


@dataclass
class Plugins:
    """What was found.

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


def load_plugins() -> Plugins:
    """Import every plugin module of the entry-point group and collect what it offers."""
    found = Plugins(pluggy.PluginManager(GROUP))
    found.manager.add_hookspecs(hookspecs)
    entries = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda entry: entry.name)
    for entry in entries:
        try:
            add_plugin(found, entry.name, entry.load())
        except Exception as problem:  # a third party's import may raise anything
            found.broken[entry.name] = f"{type(problem).__name__}: {problem}"
    return found


def add_plugin(found: Plugins, name: str, module: Any) -> None:
    """Register one plugin module.

    Raises:
        PluginError: a hook that does not exist, a name of a family, method, stage or format that is taken, an
            option that cannot stand beside the others, or a plugin registered twice.
    """
    manager = found.manager
    try:
        manager.register(module, name=name)
        manager.check_pending()
        others = [other for other in manager.get_plugins() if other is not module]
        [families] = manager.subset_hook_caller("emloc_register_families", others)() or [[]]
        [methods] = manager.subset_hook_caller("emloc_register_methods", others)() or [[]]
        [stages] = manager.subset_hook_caller("emloc_register_stages", others)() or [[]]
        [formats] = manager.subset_hook_caller("emloc_register_formats", others)() or [[]]
        _refuse_taken("family", families, found.families)
        _refuse_taken("method", methods, found.methods)
        _refuse_taken("stage", stages, found.stages)
        _refuse_taken("format", formats, found.formats)
        check_options(families, found.families.values())
        found.families.update({entry.name: entry.owned_by(name) for entry in families})
        found.methods.update({entry.name: entry.owned_by(name) for entry in methods})
        found.formats.update({entry.name: entry.owned_by(name) for entry in formats})
        found.stages.update({entry.name: entry.owned_by(name) for entry in stages})
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


def open_model(
    model_name_or_path: str | os.PathLike[str],
    single_file_config: str | None = None,
    family: str | None = None,
    recorded: str | None = None,
) -> tuple[Checkpoint, ModelFamily]:
    """A checkpoint in its family's layout, and the family.

    A light model of another method is of a format that its plugin teaches the libraries; it is imported.

    Args:
        single_file_config: where the configuration is if the model is one file; else it is not looked at.
        family: to take, of those that recognise the model.
        recorded: the family of what was made from the model, which decides where several recognise it and
            none is named; by default that of the model's own manifest.

    Raises:
        CheckpointError: it cannot be read.
        PluginError: as `family_of`, or its method is not installed.
    """
    path, folder = Path(model_name_or_path), model_name_or_path
    if path.is_file():
        known = load_plugins().families
        chosen = {} if family is None else {family: _entry(family, known)}
        folder = model_folder(path, single_file_config, chosen or known)
    _refuse_adapter(model_name_or_path)
    checkpoint = Checkpoint.open(folder)
    manifest = Manifest.find(checkpoint.path)
    if manifest is not None and manifest.method is not None:
        method_named(manifest.method).load()
    made_with = recorded or (manifest.family if manifest else None)
    opened_with = family_of(checkpoint, family, made_with)
    native = native_of(opened_with, checkpoint)
    if path.is_file():
        native.name, native.single_file_config = str(path), single_file_config
    return native, opened_with


def _refuse_adapter(folder: str | os.PathLike[str]) -> None:
    names = (
        {entry.name for entry in Path(folder).iterdir()} if Path(folder).is_dir() else set[str]()
    )
    if "adapter_config.json" in names and "config.json" not in names:
        raise CheckpointError(
            f"{folder} is a LoRA adapter, not a model; pass it as adapter beside the model it belongs to."
        )


def of_folder(config: ConfigT, model: Checkpoint) -> ConfigT:
    """A stage's options with a model's folder in place of its one file: what families work on."""
    named: str | None = getattr(config, "model_name_or_path", None)
    if named is None or not Path(named).is_file():
        return config
    return config.model_copy(update={"model_name_or_path": str(model.path)})


def family_named(name: str, families: Mapping[str, FamilyEntry] | None = None) -> ModelFamily:
    """The family of that name, imported.

    Raises:
        PluginError: no installed plugin offers it.
    """
    return _entry(name, load_plugins().families if families is None else families).load()


def _entry(name: str, known: Mapping[str, FamilyEntry]) -> FamilyEntry:
    if name not in known:
        raise PluginError(
            f"No installed plugin offers the family {name!r} (installed: "
            f"{', '.join(known) or 'none'}); install its plugin, for example pip install emloc-{name}."
        )
    return known[name]


def method_named(name: str) -> MethodEntry:
    """The method of that name.

    Raises:
        PluginError: no installed plugin offers it.
    """
    known = load_plugins().methods
    if name not in known:
        raise PluginError(
            f"No installed plugin offers the method {name!r} (installed: {', '.join(known)})."
            f"{nearest(name, list(known)) or ' Compared methods are in emloc-baselines.'}"
        )
    return known[name]


def families_for(
    method: MethodEntry, families: Mapping[str, FamilyEntry] | None = None
) -> list[str]:
    """Names of the installed families that offer what a method needs."""
    known = load_plugins().families if families is None else families
    needs = set(method.needs)
    return [entry.name for entry in known.values() if needs.issubset(entry.offers)]


def family_of(
    checkpoint: Checkpoint, name: str | None = None, recorded: str | None = None
) -> ModelFamily:
    """The family of a checkpoint, recognised from its config.

    Args:
        name: of the one to take; by default the only one.
        recorded: of the one to take where several recognise it and none is named.

    Raises:
        PluginError: none recognises it; several do, and which to take is not said; or the named one does not,
            or is not installed.
    """
    found = load_plugins()
    matches = _recognising(found, checkpoint)
    names = ", ".join(matches)
    what = checkpoint.config.get("architectures") or checkpoint.config.get("model_type")
    if name is not None and _entry(name, found.families).name not in matches:
        others = f"; {names} would" if matches else ""
        raise PluginError(
            f"family={name}: it does not recognise {checkpoint.name} ({what}){others}. Leave family out, or "
            f"pass another."
        )
    if not matches:
        broken = "".join(f" Plugin {name} is broken ({why})." for name, why in found.broken.items())
        raise PluginError(
            f"No installed family recognises {checkpoint.name} ({what}); installed: "
            f"{', '.join(found.families) or 'none'}. Install the plugin of its modality.{broken}"
        )
    if name is None and len(matches) > 1 and recorded not in matches:
        raise PluginError(
            f"Several families recognise {checkpoint.name} ({what}): {names}; pass family=NAME."
        )
    chosen = name or (recorded if len(matches) > 1 else None) or next(iter(matches))
    return matches[chosen].load()


def named_family(checkpoint: Checkpoint, family: ModelFamily) -> dict[str, str]:
    """What settings record of the family: nothing where it is the only one that recognises the model."""
    several = len(_recognising(load_plugins(), checkpoint)) > 1
    return {"family": family.name} if several else {}


def _recognising(found: Plugins, checkpoint: Checkpoint) -> dict[str, FamilyEntry]:
    matches: dict[str, FamilyEntry] = {}
    for entry in found.families.values():
        try:
            if entry.recognises(checkpoint.config):
                matches[entry.name] = entry
        except Exception as problem:  # a third party's code may raise anything
            found.broken[entry.plugin] = f"{type(problem).__name__}: {problem}"
    return matches
