"""The hooks by which plugins are discovered; behaviour is in typed protocols.

Those are `emloc.extend.family.ModelFamily`, `emloc.extend.methods.Method`, `emloc.stages.stage.Stage` and
`emloc.formats.layer_format.LayerFormat`.

A plugin is a module named by an entry point of the group `emloc`. It implements any of these with
`@emloc.hookimpl` and imports nothing heavy at its top, so that `emloc --help` stays fast.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from emloc.extend.family import FamilyEntry
    from emloc.extend.methods import MethodEntry
    from emloc.extend.stages import StageEntry
    from emloc.formats.layer_format import FormatEntry

hookspec = pluggy.HookspecMarker("emloc")
hookimpl = pluggy.HookimplMarker("emloc")


@hookspec
def emloc_register_families() -> "Sequence[FamilyEntry]":  # type: ignore[empty-body]
    """The model families that the plugin adds."""


@hookspec
def emloc_register_methods() -> "Sequence[MethodEntry]":  # type: ignore[empty-body]
    """The methods that the plugin adds, to be compared with EMLoC or used instead of it."""


@hookspec
def emloc_register_stages() -> "Sequence[StageEntry]":  # type: ignore[empty-body]
    """The stages that the plugin adds: commands, and parts of `emloc run` where they make an artefact."""


@hookspec
def emloc_register_formats() -> "Sequence[FormatEntry]":  # type: ignore[empty-body]
    """The forms that the plugin adds for a layer to take in an emulator."""


@hookspec
def emloc_register_commands(app: "typer.Typer") -> None:
    """Add commands of the plugin's own to the command line."""
