"""A model opened with its family: the one that recognises it, that is named, or that made it."""

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.intact import require_read
from emloc.errors import CheckpointError, PluginError
from emloc.extend.capabilities import native_of
from emloc.extend.family import FamilyEntry, ModelFamily
from emloc.extend.plugins import Plugins, family_entry, load_plugins, method_named
from emloc.extend.single_file import model_folder

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def open_model(
    model_name_or_path: str | os.PathLike[str],
    single_file_config: str | None = None,
    family: str | None = None,
    recorded: str | None = None,
    fresh: bool = False,
) -> tuple[Checkpoint, ModelFamily]:
    """A checkpoint in its family's layout, and the family.

    A light model of another method is of a format that its plugin teaches the libraries; it is imported.

    Args:
        single_file_config: where the configuration is if the model is one file; else it is not looked at.
        family: to take, of those that recognise the model.
        recorded: the family of what was made from the model, which decides where several recognise it and
            none is named; by default that of the model's own manifest.
        fresh: read all of what a stage of ours wrote, to compare it with its manifest (`require_intact`).

    Raises:
        CheckpointError: it cannot be read, or is not what a stage of ours wrote.
        PluginError: as `family_of`, or its method is not installed.
    """
    path, folder = Path(model_name_or_path), model_name_or_path
    if path.is_file():
        known = load_plugins().families
        chosen = {} if family is None else {family: family_entry(family, known)}
        folder = model_folder(path, single_file_config, chosen or known)
    _refuse_adapter(model_name_or_path)
    checkpoint = Checkpoint.open(folder)
    manifest = require_read(checkpoint.path, fresh)
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
        {entry.name for entry in Path(folder).iterdir()} if os.path.isdir(folder) else set[str]()
    )
    if "adapter_config.json" in names and "config.json" not in names:
        raise CheckpointError(
            f"{folder} is a LoRA adapter, not a model; pass it as adapter beside the model it belongs to."
        )


def of_folder(config: ConfigT, model: Checkpoint) -> ConfigT:
    """A stage's options with a model's folder in place of its one file: what families work on."""
    named: str | None = getattr(config, "model_name_or_path", None)
    if named is None or not os.path.isfile(named):
        return config
    return config.model_copy(update={"model_name_or_path": str(model.path)})


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
    plugins = load_plugins()
    matches = _recognising(plugins, checkpoint)
    names = ", ".join(matches)
    what = checkpoint.config.get("architectures") or checkpoint.config.get("model_type")
    if name is not None and family_entry(name, plugins.families).name not in matches:
        others = f"; {names} would" if matches else ""
        raise PluginError(
            f"family={name}: it does not recognise {checkpoint.name} ({what}){others}. Leave family out, or "
            f"pass another."
        )
    if not matches:
        raise PluginError(
            f"No installed family recognises {checkpoint.name} ({what}); installed: "
            f"{', '.join(plugins.families) or 'none'}. Install the plugin of its modality."
            f"{plugins.said_broken()}"
        )
    if name is None and len(matches) > 1 and recorded not in matches:
        raise PluginError(
            f"Several families recognise {checkpoint.name} ({what}): {names}; pass family=NAME."
        )
    chosen = name or (recorded if len(matches) > 1 else None) or next(iter(matches))
    return matches[chosen].load()


def named_family(checkpoint: Checkpoint, family: ModelFamily) -> dict[str, str]:
    """The entry of settings that names the family: nothing where it is the only one that recognises the
    model.
    """
    several = len(_recognising(load_plugins(), checkpoint)) > 1
    return {"family": family.name} if several else {}


def _recognising(plugins: Plugins, checkpoint: Checkpoint) -> dict[str, FamilyEntry]:
    matches: dict[str, FamilyEntry] = {}
    for entry in plugins.families.values():
        try:
            if entry.recognises(checkpoint.config):
                matches[entry.name] = entry
        except Exception as problem:  # a third party's code may raise anything
            plugins.broken[entry.plugin] = f"{type(problem).__name__}: {problem}"
    return matches
