"""The parts of a vision-language model, whatever its architecture calls them."""

from collections.abc import Mapping
from typing import Any

from emloc_vlm_options import FreezeOptions

VISION = (
    "vision_tower", "vision_model", "visual", "vision_encoder", "image_encoder", "image_tower",
    "video_tower",
)  # fmt: skip
PROJECTOR = ("multi_modal_projector", "connector", "mlp1", "aligner", "merger", "embed_vision")


def part_of(name: str) -> str:
    """`vision`, `projector` or `language`: where a module of that name belongs."""
    words = name.split(".")
    if any(word in PROJECTOR for word in words):  # some lie inside the vision tower
        return "projector"
    return "vision" if any(word in VISION for word in words) else "language"


def frozen_modules(model: Any, options: FreezeOptions) -> set[str]:
    """The modules of the parts that the LoRA leaves alone."""
    frozen: Mapping[str, bool] = {
        "vision": options.freeze_vision_tower,
        "projector": options.freeze_multi_modal_projector,
        "language": options.freeze_language_model,
    }
    return {name for name, _ in model.named_modules() if frozen[part_of(name)]}
