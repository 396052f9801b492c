"""The core by itself: whatever else is installed beside it is out of sight."""

import importlib.metadata
import sys
from contextlib import contextmanager
from unittest.mock import patch

from emloc.extend.plugin_options import forget_plugin_options
from emloc.extend.plugins import GROUP

ABSENT = {
    "transformers", "diffusers", "peft", "timm", "accelerate", "datasets", "trl", "tokenizers",
    "bitsandbytes", "prodigyopt", "torchvision", "gguf",
    "emloc_llm", "emloc_llm_hooks", "emloc_vlm", "emloc_vlm_hooks", "emloc_vlm_options",
    "emloc_diffusion", "emloc_diffusion_hooks", "emloc_diffusion_options",
    "emloc_baselines", "emloc_baselines_hooks",
}  # fmt: skip
"""Libraries of models, what goes with them, and the plugins."""

ON_LIBRARIES = (
    "emloc.integrations.transformers",
    "emloc.integrations.diffusers",
    "emloc.integrations.peft",
)
"""Parts of the core that only they import, and that another test may have imported."""


class Blocker:
    """A finder, first of all, by which nothing of `ABSENT` is there."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextmanager
def alone():
    """Hide them, their modules that are imported already, and all plugins' entry points."""
    real = importlib.metadata.entry_points

    def entry_points(**asked):
        return [] if asked.get("group") == GROUP else real(**asked)

    hidden = [
        name for name in sys.modules
        if name.partition(".")[0] in ABSENT or name.startswith(ON_LIBRARIES)
    ]  # fmt: skip
    modules = {name: sys.modules.pop(name) for name in hidden}
    blocker = Blocker()
    sys.meta_path.insert(0, blocker)
    forget_plugin_options()
    try:
        with patch.object(importlib.metadata, "entry_points", entry_points):
            yield
    finally:
        sys.meta_path.remove(blocker)
        sys.modules.update(modules)
        forget_plugin_options()
