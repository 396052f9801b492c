"""The largest micro-batch of a vision-language model, for plans."""

from collections.abc import Mapping
from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import ConfigError
from emloc.extend.family import Batch

MOST_TILES = 12
"""InternVL's own limit, where the config says none: that of its processor's files."""


def largest_batch(checkpoint: Checkpoint, options: Any, samples: int) -> Batch:
    """Samples of `max_length` tokens, each with an image of as many tiles as fit in them.

    Raises:
        ConfigError: not even one tile fits.
    """
    config = checkpoint.config
    length, vision = options.max_length, config["vision_config"]
    per_tile = _image_tokens(config)
    tiles = min(_tiles(config, options.max_dynamic_patch), (length - 1) // per_tile)
    if tiles == 0:
        raise ConfigError(
            f"max_length={length} leaves no room for an image, one of which takes {per_tile} tokens "
            f"in {checkpoint.name}; raise max_length."
        )
    ids = torch.empty(samples, length, dtype=torch.int64, device="meta")
    sides = vision.get("image_size", 224)
    sides = [sides, sides] if isinstance(sides, int) else sides
    pixels = torch.empty(samples * tiles, vision.get("num_channels", 3), *sides, device="meta")
    masks = {"attention_mask": ids} if samples > 1 else {}
    return {"input_ids": ids, **masks, "labels": ids, "pixel_values": pixels}


def _image_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of one tile, where the config says so."""
    return int(config.get("image_seq_length") or 1)


def _tiles(config: Mapping[str, Any], most: int | None) -> int:
    """Tiles of an image at most, the thumbnail included."""
    if "image_seq_length" not in config:
        return 1
    cut_up = config.get("dynamic_image_size", True)
    tiles = most or (int(config.get("max_dynamic_patch", MOST_TILES)) if cut_up else 1)
    return tiles + 1 if tiles > 1 else 1
