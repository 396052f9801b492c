"""The same architecture with fewer blocks, by its config.

A config of an encoder and a decoder says how many blocks each has; T5's says of its decoder only where it
differs from the encoder.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from transformers import AutoConfig

DECODER = ("decoder_layers", "num_decoder_layers")
"""Entries of configs that say how many blocks the decoder behind an encoder has."""


def depths(config: Mapping[str, Any]) -> list[int]:
    """Blocks of each stack of a parsed config (of a tower, where there are several)."""
    return depths_of(_config(config))


def depths_of(config: Any) -> list[int]:
    """The same of a config of transformers."""
    return [int(getattr(config, name)) for name in _counts(config)]


def cut(config: Mapping[str, Any], blocks: Sequence[int]) -> dict[str, Any]:
    """The config with so many blocks in each stack."""
    whole = _config(config)
    names = _counts(whole)
    mapped = [whole.attribute_map.get(name, name) for name in names]
    changed = {**config, **dict(zip(mapped, blocks))}
    for key, value in whole.to_dict().items():
        if key.endswith("layer_types") and isinstance(value, list):  # one kind per block
            changed[key] = cast("list[Any]", value)[: blocks[0]]
    return changed


def _counts(config: Any) -> list[str]:
    """The attributes with the number of blocks of each stack."""
    two = getattr(config, "is_encoder_decoder", False)
    decoder = [name for name in DECODER if two and isinstance(getattr(config, name, None), int)]
    return ["num_hidden_layers", *decoder[:1]]


def _config(config: Mapping[str, Any]) -> Any:
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    return AutoConfig.for_model(content.pop("model_type"), **content)
