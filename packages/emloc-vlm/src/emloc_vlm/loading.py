"""Load a vision-language model, or an emulator of one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from emloc.artefacts.checkpoint import Checkpoint
from emloc.integrations.transformers.capacity import Capacity, capacity_of
from emloc.integrations.transformers.loading import load_model
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


def load_vlm(path: Path, dtype: str, device: str) -> Any:
    """The model, its weights on `device`; OpenGVLab's InternVL as transformers' own class.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    checkpoint = Checkpoint.open(path)
    if not is_internvl_chat(checkpoint.config):
        return load_model(path, AutoModelForImageTextToText, dtype, device)
    view = native_view(checkpoint)
    stored = next(iter(view.tensors.values())).dtype
    wanted = stored if dtype == "auto" else getattr(torch, dtype)
    model: Any = empty_model(view, AutoModelForImageTextToText, wanted)
    for name in view.tensors:
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(view.read(name).to(device, wanted), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, value)
    model.tie_weights()
    return model.to(device)
