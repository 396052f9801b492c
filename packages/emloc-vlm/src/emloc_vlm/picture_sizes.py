"""The sizes that a processor's configuration asks pictures to have, which must be of this world.

A configuration is somebody's file, and a side of a million pixels there is a terabyte here.
"""

import math
from pathlib import Path
from typing import Any, cast

from emloc.errors import CheckpointError

MOST_PIXELS = 1 << 25
"""Pixels of one picture with all of its tiles, as a processor makes them."""

LONGEST_SIDE = 1 << 14
"""A larger edge is a number of pixels, as Qwen's processors have it."""

MOST_PLACES = 1 << 14
"""Tokens that stand for one picture, or one of its tiles."""

_PLACES = ("image_seq_length", "image_seq_len", "num_image_tokens", "num_additional_image_tokens")
_SIZES = ("size", "crop_size", "pad_size", "max_image_size")
_SCALES = ("rescale_factor", "image_mean", "image_std")
_TILES = ("max_patches", "max_image_tiles", "max_num_tiles", "max_dynamic_patch")


def require_modest(image_processor: Any, path: Path) -> None:
    """Refuse a processor that would make more pixels of one picture than any model reads.

    Raises:
        CheckpointError: it would, or what it says of sizes are no numbers.
    """
    said = {name: getattr(image_processor, name, None) for name in (*_SIZES, *_TILES)}
    numbers = {name: _numbers(value) for name, value in said.items()}
    for name, given in numbers.items():
        if not all(type(one) in (int, float) and 0 < one < 1 << 31 for one in given.values()):
            raise CheckpointError(
                f"The processor of {path} has {name} = {str(said[name])[:80]}, which are not numbers of "
                f"pixels or tiles; copy its files from the model again."
            )
    for name in _SCALES:
        scale = getattr(image_processor, name, None)
        if not (scale is None or _is_number(scale) or _is_colour(scale)):
            raise CheckpointError(
                f"The processor of {path} has {name} = {str(scale)[:80]}, which is neither a number nor one "
                f"for each colour; copy its files from the model again."
            )
    tiles = max((one for name in _TILES for one in numbers[name].values()), default=1)
    pixels = max((_pixels(numbers[name]) for name in _SIZES), default=0)
    if pixels * tiles > MOST_PIXELS:
        raise CheckpointError(
            f"The processor of {path} would turn a picture and its tiles into {pixels * tiles:,.0f} pixels, "
            f"but no model reads more than {MOST_PIXELS:,}; copy its files from the model again."
        )


def require_few_places(processor: Any, path: Path) -> None:
    """Refuse a processor that would put more places into the text for a picture than any context holds.

    Raises:
        CheckpointError: it would, or what it says of them is no number.
    """
    for name in _PLACES:
        places = getattr(processor, name, None)
        if places is not None and not (type(places) is int and 0 <= places <= MOST_PLACES):
            raise CheckpointError(
                f"The processor of {path} has {name} = {str(places)[:80]}, but a picture takes 0 to "
                f"{MOST_PLACES:,} tokens; copy its files from the model again."
            )


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1 << 31


def _is_colour(value: Any) -> bool:
    """Return whether it is a number for each of a picture's few channels."""
    if not isinstance(value, (list, tuple)):
        return False
    numbers = cast("list[Any]", value)
    return 1 <= len(numbers) <= 4 and all(map(_is_number, numbers))


def _numbers(value: Any) -> dict[str, Any]:
    """An entry's numbers by what they are of; one without a name is a side."""
    if isinstance(value, (int, float, str)):
        return {"side": value}
    if isinstance(value, (list, tuple)):
        sides = cast("list[Any]", value)
        return dict(zip(("height", "width"), sides))
    try:
        entries: dict[str, Any] = dict(value)  # transformers' own kind of mapping, too
    except (TypeError, ValueError):
        return {}
    return {name: one for name, one in entries.items() if one is not None}


def _pixels(sizes: dict[str, float]) -> float:
    """The pixels that an entry allows: of a rectangle, of a square, or counted."""
    if {"height", "width"} <= sizes.keys():
        return math.prod((sizes["height"], sizes["width"]))
    counted = (n if n > LONGEST_SIDE or "pixels" in name else n * n for name, n in sizes.items())
    return max(counted, default=0)
