"""The rule by which `limit=auto` chooses, applied to the losses that a correction writes down."""

from typing import Any


def chosen_limit(summary: dict[str, Any]) -> str:
    """The limit of the least loss on one half; `0`, no correction, if it is worse than that on the other."""
    halves = summary["halves"]
    best = min(halves, key=lambda name: halves[name]["chosen_on"])
    return best if halves[best]["checked_on"] <= halves["0"]["checked_on"] else "0"
