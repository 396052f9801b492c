"""A config under which a model of transformers stores a tensor of its own for each tied parameter.

Embeddings and head are tied by `tie_word_embeddings`, of the model or of a part of it. Without it,
`from_pretrained` reads both from the checkpoint, and the model computes the same, unless its forward asks for
that option (some scale what the head reads).
"""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from emloc.artefacts.checkpoint import Checkpoint

OPTION = "tie_word_embeddings"
TEXT = ("text_config", "llm_config", "decoder", "language_config")
"""Keys under which configs describe the language model."""


def untied_config(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any] | None:
    """The checkpoint's config with nothing tied, or None if a forward of the model depends on it."""
    if any(_asks(type(module)) for module in model.modules()):
        return None
    return _untied(checkpoint.config)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    parts = {
        key: _untied(value)
        for key, value in config.items()
        if isinstance(value, Mapping) and (OPTION in value or key in TEXT)
    }
    return {**config, **parts, OPTION: False}


def _asks(kind: type[nn.Module]) -> bool:
    """Return whether the forward itself reads the option."""
    try:
        return OPTION in inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
