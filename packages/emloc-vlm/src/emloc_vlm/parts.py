"""The parts of a vision-language model, whatever its architecture calls them."""

import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from emloc_vlm_options import FreezeOptions

VISION = (
    "vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder", "image_tower",
    "video_tower",
)  # fmt: skip
PROJECTOR = ("multi_modal_projector", "connector", "mlp1", "aligner", "merger", "embed_vision")


TEXT = ("language_model", "text_model")

# What other names say, such as `vision_projection` or `audio_tower`, outside of blocks.
_LIKE_PROJECTOR = re.compile(
    r"project(or|ion)|_proj$|vision_embed|resampler|q_?former|connector|aligner|adapter|merger"
)
_LIKE_VISION = re.compile(r"vision|visual|image|video|audio|speech|vqmodel")
_OF_SOUND = re.compile(r"audio|speech")


def part_of(name: str) -> str:
    """`vision`, `projector` or `language`: where a module of that name belongs.

    Towers of sound count as vision: they, too, are seen through a projector.
    """
    words = name.split(".")
    if any(word in PROJECTOR for word in words):  # some lie inside the vision tower
        return "projector"
    if any(word in VISION for word in words):
        return "vision"
    if any(word in TEXT for word in words):
        return "language"
    outside = list(takewhile(lambda word: not word.isdigit(), words))
    if any(_LIKE_PROJECTOR.search(word) for word in outside):
        return "projector"
    return "vision" if any(_LIKE_VISION.search(word) for word in outside) else "language"


def sees(name: str) -> bool:
    """Return whether a module of that name belongs to what reads pixels, and not sound."""
    return part_of(name) == "vision" and not _OF_SOUND.search(name)


def frozen_modules(model: Any, options: FreezeOptions) -> set[str]:
    """The modules of the parts that the LoRA leaves alone."""
    frozen: Mapping[str, bool] = {
        "vision": options.freeze_vision_tower,
        "projector": options.freeze_multi_modal_projector,
        "language": options.freeze_language_model,
    }
    return {name for name, _ in model.named_modules() if frozen[part_of(name)]}
