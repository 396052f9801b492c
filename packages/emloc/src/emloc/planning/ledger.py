"""Memory as named integers that a reader can add up."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Lines = Mapping[str, int]
"""Bytes by what they are for, in the order that they are shown."""

PLACES = ("device", "host", "disk")


def total(lines: Lines) -> int:
    """The sum."""
    return sum(lines.values())


def lines_of(**named: int) -> dict[str, int]:
    """Lines whose names have underscores for spaces, those of no bytes left out."""
    return {name.replace("_", " "): count for name, count in named.items() if count}


def largest(instants: Iterable[Lines]) -> Lines:
    """The moment that takes most."""
    return max(instants, key=total, default={})


@dataclass(frozen=True)
class StageMemory:
    """The memory that a stage takes.

    Attributes:
        device: memory of the device that computes: a GPU's, or the machine's where that is the CPU.
        host: the machine's memory besides.
        disk: what is written.
        moment: which moment of the stage the lines of the device are of.
    """

    device: Lines = field(default_factory=dict[str, int])
    host: Lines = field(default_factory=dict[str, int])
    disk: Lines = field(default_factory=dict[str, int])
    moment: str = ""

    def lines(self, place: str) -> Lines:
        """The lines of one of `PLACES`."""
        return getattr(self, place)

    def as_json(self) -> dict[str, Any]:
        """`device_bytes`, `host_bytes`, `disk_bytes`, each `total` and `lines`."""
        places = {
            f"{place}_bytes": {"total": total(self.lines(place)), "lines": dict(self.lines(place))}
            for place in PLACES
        }
        return {**places, **({"moment": self.moment} if self.moment else {})}
