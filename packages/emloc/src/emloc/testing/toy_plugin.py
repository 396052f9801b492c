"""The plugin of the toy family: a light module, as a package names it in its entry point.

    [project.entry-points.emloc]
    toy = "emloc.testing.toy_plugin"

Core does not install it; `emloc.testing.plugin_installed` does for as long as a test needs it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import emloc
from emloc.extend.family import FamilyEntry


@emloc.hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """The toy family, which is imported once one of its models is opened."""

    def recognises(config: Mapping[str, Any]) -> bool:
        return config.get("model_type") == "emloc-toy"

    target = "emloc.testing.toy_family:ToyFamily"
    return [FamilyEntry("toy", "small pictures, for tests", target, recognises)]
