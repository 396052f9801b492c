"""The same architecture with fewer blocks, by its config."""

from collections.abc import Mapping
from typing import Any, cast

from transformers import AutoConfig


def depth(config: Mapping[str, Any]) -> int:
    """Blocks of a parsed config (of a tower, where there are several)."""
    return int(_config(config).num_hidden_layers)


def cut(config: Mapping[str, Any], blocks: int) -> dict[str, Any]:
    """The config with so many blocks."""
    whole = _config(config)
    name = whole.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changed = {**config, name: blocks}
    for key, value in whole.to_dict().items():
        if key.endswith("layer_types") and isinstance(value, list):  # one kind per block
            changed[key] = cast("list[Any]", value)[:blocks]
    return changed


def _config(config: Mapping[str, Any]) -> Any:
    content = {key: value for key, value in config.items() if key != "quantization_config"}
    return AutoConfig.for_model(content.pop("model_type"), **content)
