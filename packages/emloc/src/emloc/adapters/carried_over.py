"""A part of an adapter that goes on as it is, such as the LoRA of a text encoder beside a corrected one."""

from pathlib import Path

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.small_files import copy_file, write_json


def carry_over(part: Adapter, base: Checkpoint, folder: Path) -> None:
    """Copy it: there is no mismatch to correct, and only the name of the base changes."""
    copy_file(part.path / WEIGHTS_NAME, folder / WEIGHTS_NAME)
    write_json(
        folder / CONFIG_NAME, {**part.config, "base_model_name_or_path": base.reference_name()}
    )
