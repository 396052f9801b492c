"""Folders of models: local ones, and those of the hub, downloaded or taken from its cache."""

import os
from pathlib import Path

from emloc.artefacts.companions import PATTERNS
from emloc.errors import CheckpointError


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
    looks_like_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    if not looks_like_hub_id:
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
