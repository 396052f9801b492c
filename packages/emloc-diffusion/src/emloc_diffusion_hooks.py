"""The plugin's entry point: says what it offers and imports nothing heavy."""

from collections.abc import Sequence

import emloc
from emloc.family import FamilyEntry


@emloc.hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """Diffusion models."""
    return []
