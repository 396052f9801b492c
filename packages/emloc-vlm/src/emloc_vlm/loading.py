"""Capacity of a vision-language model."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from emloc.artefacts.checkpoint import Checkpoint
from emloc.integrations.transformers.capacity import Capacity, capacity_of
from emloc.integrations.transformers.skeleton import empty_model
from emloc_vlm.internvl_chat import is_internvl_chat, native_view


def load_vlm_capacity(path: Path) -> Capacity:
    """Rows and positions of the model in a folder, from its config alone.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    checkpoint: Any = Checkpoint.open(path)
    if is_internvl_chat(checkpoint.config):
        checkpoint = native_view(checkpoint)
    return capacity_of(empty_model(checkpoint, AutoModelForImageTextToText, torch.float32))
