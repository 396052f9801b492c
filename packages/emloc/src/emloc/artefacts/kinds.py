"""Kinds of artefact, in the order in which the method makes them.

Stages declare the kinds that they take and make, and never each other, so that a stage may stand between any
two others: one that takes an emulator and makes one repairs it, whoever wrote it and whoever reads it.
"""

from dataclasses import dataclass
from typing import Literal

KindName = Literal["emulator", "adapter", "corrected_adapter", "merged_model", "evaluation"]


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        name: in manifests.
        order: its place in the order of making.
    """

    name: str
    order: int

    def __str__(self) -> str:
        """The name in messages."""
        return self.name.replace("_", " ")


BASE = Kind("model", 0)
EMULATOR = Kind("emulator", 1)
ADAPTER = Kind("adapter", 2)
CORRECTED_ADAPTER = Kind("corrected_adapter", 3)
MERGED_MODEL = Kind("merged_model", 4)
EVALUATION = Kind("evaluation", 5)
