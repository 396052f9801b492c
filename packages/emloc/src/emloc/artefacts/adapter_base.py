"""The model that an adapter says it runs on.

PEFT's config holds whatever its trainer was given: an absolute path, a hub id, or a path relative to a folder
that nobody knows any more. Our manifest beside it holds an absolute path or a hub id, and is believed first.
A relative path is never looked for below the folder that we happen to be in, where another model may lie.
"""

import os
from pathlib import Path

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.locate import folder_here, looks_like_hub_id
from emloc.artefacts.manifest import Manifest
from emloc.errors import ConfigError, MismatchError


def named_base(adapter: Adapter, origin: Manifest | None) -> str | None:
    """An absolute path or a hub id; None where there is none, or only a relative path.

    Args:
        origin: the adapter's manifest.
    """
    by_peft = _by_peft(adapter)
    if origin is None:
        return None if by_peft is None or _is_relative(by_peft) else by_peft
    runs_on = origin.emulator if origin.kind == "adapter" and origin.emulator else None
    recorded = (runs_on or origin.base_model).name_or_path
    if os.path.isabs(recorded) and not os.path.exists(recorded) and by_peft is not None:
        # The model has moved, and somebody may have told PEFT where to.
        return by_peft if os.path.isabs(by_peft) and os.path.exists(by_peft) else recorded
    return recorded


def require_base(adapter: Adapter, origin: Manifest | None, stage: str) -> str:
    """`named_base`, which a stage cannot do without.

    Raises:
        ConfigError: there is none.
        MismatchError: it is another revision of the hub's than the one that its id stands for.
    """
    name = named_base(adapter, origin)
    if name is not None:
        refuse_other_revision(adapter, origin, name)
        return name
    by_peft = _by_peft(adapter)
    if by_peft is None:
        raise ConfigError(f"{stage}: the adapter names no base model; pass model_name_or_path.")
    raise ConfigError(
        f"{stage}: {adapter.path} names its base model {by_peft}, which may be a path relative to the "
        f"folder where it was trained; pass model_name_or_path."
    )


def folder_named(adapter: Adapter) -> Path | None:
    """The folder that PEFT's config seems to name, to refuse what it shows to be wrong.

    A relative path is looked for from here: at worst something right is refused, nothing wrong is read. A hub
    id stands for what the hub's cache has of it.
    """
    by_peft = _by_peft(adapter)
    return None if by_peft is None else folder_here(by_peft, revision_of(adapter))


def is_of_hub(adapter: Adapter) -> bool:
    """Return whether PEFT's config names its base by an id of the hub."""
    by_peft = _by_peft(adapter)
    return by_peft is not None and not os.path.exists(by_peft) and looks_like_hub_id(by_peft)


def refuse_other_revision(adapter: Adapter, origin: Manifest | None, name: str) -> None:
    """Refuse a hub id as the base of an adapter that was trained on another than its main revision.

    Args:
        origin: the adapter's manifest, whose digest says more than a revision.
        name: of the model that is to be its base.

    Raises:
        MismatchError: PEFT's config has a `revision`, and `name` is a hub id.
    """
    revision = revision_of(adapter)
    if origin is None and revision is not None and not os.path.exists(name):
        by_peft = _by_peft(adapter) or name
        raise MismatchError(
            f"Adapter {adapter.path} was trained on the revision {revision} of {by_peft}, and {name} stands "
            f"for the main one; download the other (hf download {by_peft} --revision {revision} --local-dir "
            f"FOLDER) and pass FOLDER as model_name_or_path."
        )


def revision_of(adapter: Adapter) -> str | None:
    """The revision in PEFT's config, unless it is what a hub id stands for anyway."""
    revision = adapter.config.get("revision")
    return revision if isinstance(revision, str) and revision not in ("", "main") else None


def _by_peft(adapter: Adapter) -> str | None:
    name = adapter.config.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _is_relative(name: str) -> bool:
    """Return whether a name is a path that leads somewhere else from every folder, or may be one."""
    if os.path.isabs(name):
        return False
    return not looks_like_hub_id(name) or os.path.exists(name)
