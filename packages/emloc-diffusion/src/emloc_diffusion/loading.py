"""Load the denoiser of a pipeline, or of an emulator of one."""

from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc_diffusion.denoisers import denoiser_of
from emloc_diffusion.encode.components import load_errors


def load_denoiser(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """Load the denoiser in eval mode, nothing trainable.

    Args:
        dtype: a dtype's name, or `auto` for the one that the checkpoint stores most bytes of.

    Raises:
        CheckpointError: diffusers cannot load it.
    """
    kind = _stored_dtype(checkpoint) if dtype == "auto" else getattr(torch, dtype)
    with load_errors(checkpoint.path, "denoiser"):
        model = denoiser_of(checkpoint).model_class.from_pretrained(
            str(checkpoint.path),
            subfolder=checkpoint.layout.folder.rstrip("/"),
            torch_dtype=kind,
            use_safetensors=True,
        )
    return model.to(device).requires_grad_(False).eval()


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])
