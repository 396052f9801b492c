"""Formats by name: core's own and those that plugins register."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from emloc.config import nearest
from emloc.errors import CheckpointError, PluginError
from emloc.extend.plugins import load_plugins
from emloc.formats.layer_format import CORE_FORMATS, Form, LayerFormat
from emloc.options.compress import AUTO, LOW_RANK_FORMAT

ABOUT_A_GROUP = ("format", "layers")
"""Keys of a group's entry in a config that are no sizes."""

MOST = 1 << 31
"""A number that no size reaches."""


def format_named(name: str) -> LayerFormat:
    """The format of that name, imported.

    Raises:
        PluginError: neither core nor an installed plugin has it.
    """
    for entry in CORE_FORMATS:  # before plugins are looked for
        if entry.name == name:
            return entry.load()
    plugins = load_plugins()
    known = plugins.formats
    if name not in known:
        raise PluginError(
            f"No installed plugin offers the format {name!r} (installed: {', '.join(known)}; {AUTO} "
            f"chooses for each layer).{nearest(name, [AUTO, *known])}{plugins.said_broken()}"
        )
    return known[name].load()


class Forms:
    """Forms from entries of configs and manifests; each format is looked up once."""

    def __init__(self) -> None:
        self._known: dict[str, LayerFormat] = {}

    def of_config(self, entry: Mapping[str, Any]) -> Form:
        """The form of a group in `quantization_config`.

        Raises:
            PluginError: the format is not installed.
            CheckpointError: a size is missing, or none.
        """
        form = self._sized(entry, "config")
        more = {key: value for key, value in entry.items() if key not in ABOUT_A_GROUP}
        return replace(form, sizes={**more, **form.sizes})

    def of_manifest(self, entry: Mapping[str, Any]) -> Form:
        """The form of a group in a manifest, whose sizes lie among other figures.

        Raises:
            PluginError: the format is not installed.
            CheckpointError: a size is missing, or none.
        """
        return self._sized(entry, "manifest")

    def _sized(self, entry: Mapping[str, Any], source: str) -> Form:
        name = str(entry.get("format", LOW_RANK_FORMAT))
        format = self._named(name)
        lost = [key for key in format.size_names if key not in entry]
        if lost:
            raise CheckpointError(
                f"The emulator's {source} has an entry of format {name} without {', '.join(lost)}; compress "
                f"the base model again."
            )
        for key in format.size_names:
            if type(entry[key]) is not int or not 0 <= entry[key] < MOST:
                raise CheckpointError(
                    f"The emulator's {source} has an entry of format {name} with {key} = "
                    f"{str(entry[key])[:60]}, which is not a size; compress the base model again."
                )
        return Form(format, {key: entry[key] for key in format.size_names})

    def _named(self, name: str) -> LayerFormat:
        if name not in self._known:
            self._known[name] = format_named(name)
        return self._known[name]
