"""Checkpoints of which the config is all that is there, or all that is looked at."""

from collections.abc import Mapping
from typing import Any, ClassVar

from emloc.artefacts.checkpoint import Checkpoint


class Described(Checkpoint):
    """A checkpoint without files; its config is the whole of it."""

    translated: ClassVar[bool] = True

    def having(self, config: Mapping[str, Any]) -> "Described":
        """The same with another config."""
        return Described(self.name, self.path, dict(config), {})
