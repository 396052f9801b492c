"""Folders of models: local ones, and those of the hub, downloaded or taken from its cache."""

import os
from pathlib import Path

from emloc.artefacts.companions import PATTERNS
from emloc.artefacts.layout import PIPELINE_NAME
from emloc.errors import CheckpointError


def looks_like_hub_id(name: str) -> bool:
    """Return whether a name may be a repository of the hub: `model` or `owner/model`."""
    return bool(name) and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def folder_here(name: str, revision: str | None = None) -> Path | None:
    """The local folder of a path or hub id, as far as it can be told without the network; else None.

    Args:
        revision: of the hub's repository; its main one by default.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name) or not looks_like_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for config in ("config.json", PIPELINE_NAME):
        try:
            cached = try_to_load_from_cache(name, config, revision=revision)
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return None


def locate(name: str, weights: bool = True) -> Path:
    """The local folder of a path or hub id.

    Args:
        weights: without them, nothing but JSON is downloaded: enough for what a config says.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had.
    """
    if os.path.isdir(name):
        return Path(name)
    if os.path.exists(name):
        raise CheckpointError(f"{name} is a file; pass the model's folder.")
    if not looks_like_hub_id(name):
        raise CheckpointError(f"No folder {name}; pass a local folder or a hub id.")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", *PATTERNS] if weights else ["*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as problem:  # the hub's many errors all mean: not to be had
        raise CheckpointError(
            f"No folder {name}, and the hub did not provide it ({type(problem).__name__}: "
            f"{str(problem).splitlines()[0] if str(problem) else ''}); check the name, the network and "
            f"HF_TOKEN, or download it first."
        ) from problem
