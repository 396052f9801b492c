"""Stages as plugins register them, without importing them."""

from dataclasses import dataclass, replace

COMMANDS = ("run", "families", "methods", "new-family")
"""Commands of core's that are no stages, and whose names no stage may have."""


@dataclass(frozen=True)
class StageEntry:
    """One stage of a plugin.

    Attributes:
        name: as its function is called.
        target: `module:attribute` of the function that `emloc.stages.stage.stage` decorates; imported when
            the command line is built, so its module imports nothing heavy at its top.
        plugin: filled in by core.
    """

    name: str
    target: str
    plugin: str = ""

    def owned_by(self, plugin: str) -> "StageEntry":
        """The same entry with its plugin's name."""
        return replace(self, plugin=plugin)
