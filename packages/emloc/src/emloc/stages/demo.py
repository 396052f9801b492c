"""The whole method on a small real model, by the family's own demo."""

from pathlib import Path

from emloc.artefacts.output_place import require_folder
from emloc.config import DemoConfig
from emloc.extend.capabilities import run_demo
from emloc.extend.plugins import family_named
from emloc.stages.stage import stage


@stage(DemoConfig, check=lambda config: require_folder(config.output_dir))
def demo(config: DemoConfig) -> Path:
    """Compress, train, correct and evaluate; prints a table and returns the output folder."""
    return run_demo(family_named(config.family), config)
