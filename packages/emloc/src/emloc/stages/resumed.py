"""The checkpoint that a training is told to resume from: one of the same training, or refused.

A Trainer takes the LoRA, the optimiser and the learning rate from the checkpoint, whatever its own options
say, and would write an adapter that its manifest describes wrongly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc.artefacts.digest import dataset_digest
from emloc.artefacts.json_files import read_json
from emloc.artefacts.manifest import Manifest
from emloc.artefacts.output_place import PARTIAL
from emloc.artefacts.settings import difference
from emloc.artefacts.stage_folder import SETTINGS_NAME
from emloc.config import TrainingOptions
from emloc.errors import ConfigError

KEY = "checkpoint_digest"
LONGER = frozenset({"max_steps", "num_train_epochs", KEY})
"""Settings that may differ: a training may go on for longer, from a checkpoint that was itself resumed."""


def resumed_from(
    config: TrainingOptions, output_dir: Path, settings: Mapping[str, Any]
) -> dict[str, str]:
    """The entry of settings for a checkpoint of another run; empty for one of the run's own, or none.

    Args:
        settings: of this training.

    Raises:
        ConfigError: the checkpoint was written by a training with other options, model or data.
    """
    if config.resume_from_checkpoint in ("auto", "never"):
        return {}
    checkpoint = Path(config.resume_from_checkpoint).resolve()
    own = output_dir.resolve()
    if checkpoint.parent in (own, own.with_name(own.name + PARTIAL)) or not checkpoint.is_dir():
        return {}
    recorded = _recorded(checkpoint)
    other = "" if recorded is None else difference(recorded, settings, LONGER)
    if other:
        raise ConfigError(
            f"resume_from_checkpoint: {checkpoint} is of a training with {other}; pass the same options, or "
            f"go on from its LoRA as a new training (adapter)."
        )
    return {KEY: str(dataset_digest(str(checkpoint)))}


def _recorded(checkpoint: Path) -> Mapping[str, Any] | None:
    """The settings of the training that wrote a checkpoint; None for another library's."""
    for folder in (checkpoint, checkpoint.parent):
        if (folder / SETTINGS_NAME).is_file():
            return read_json(folder / SETTINGS_NAME)
    manifest = Manifest.find(checkpoint.parent)
    return None if manifest is None else manifest.settings
