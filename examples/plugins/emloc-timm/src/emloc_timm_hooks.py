"""The plugin's entry point: says what it offers, and imports nothing heavy."""

from collections.abc import Mapping, Sequence
from typing import Any

from emloc.plugin import FamilyEntry, hookimpl


def recognises(config: Mapping[str, Any]) -> bool:
    """Tell a Vision Transformer, as timm saves it, from its parsed `config.json`."""
    named = str(config.get("architecture")).startswith("vit_")
    return named and isinstance(config.get("pretrained_cfg"), dict)


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """The family, which is imported once one of its models is opened."""
    target = "emloc_timm.family:TimmFamily"
    return [FamilyEntry("timm", "Vision Transformers of timm", target, recognises)]
