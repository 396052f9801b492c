"""Digests of everything that goes into a result: options, and the content of whatever they name on disk."""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.digest import dataset_digest


def digest(content: Any) -> str:
    """SHA-256 of JSON content."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def content_of(options: Any) -> Any:
    """Options as JSON, with a digest instead of every path: what is there counts, not where."""
    if isinstance(options, Mapping):
        given = cast("Mapping[str, Any]", options)
        return {str(name): _content(str(name), value) for name, value in sorted(given.items())}
    if isinstance(options, list | tuple):
        return [content_of(value) for value in cast("list[Any]", options)]
    if isinstance(options, str | Path) and str(options):
        parts = str(options).split(",")
        if all(part and os.path.exists(part) for part in parts):
            return [_path_digest(part) for part in parts]
        return str(options)
    return options


def _content(name: str, value: Any) -> Any:
    """Content of an option; where several patterns are given, their order is part of it."""
    if name.endswith("_pattern") and isinstance(value, Mapping) and len(value) > 1:
        return [
            [pattern, content_of(of)] for pattern, of in cast("Mapping[str, Any]", value).items()
        ]
    return content_of(value)


@cache
def model_digest(model_name_or_path: str) -> str:
    """Weights, config and tokenizer of a model."""
    model = Checkpoint.open(model_name_or_path)
    return digest([model.digest(), model.companions_digest()])


@cache
def _path_digest(path: str) -> str:
    if (Path(path) / "config.json").is_file() or (Path(path) / "model_index.json").is_file():
        return model_digest(path)
    return str(dataset_digest(path))
