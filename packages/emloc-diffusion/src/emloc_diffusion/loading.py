"""Load the denoiser of a pipeline, or of an emulator of one."""

from contextlib import nullcontext
from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.whole_weights import require_whole
from emloc.integrations.diffusers.few_bits import four_bits_anywhere
from emloc_diffusion.denoisers import denoiser_of
from emloc_diffusion.encode.components import load_errors


def load_denoiser(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """Load the denoiser in eval mode, nothing trainable.

    Args:
        dtype: a dtype's name, or `auto` for the one that the checkpoint stores most bytes of.

    Raises:
        CheckpointError: diffusers cannot load it, or a parameter is in none of its files.
    """
    few_bits = (checkpoint.config.get("quantization_config") or {}).get("load_in_4bit")
    kind = checkpoint.main_dtype if dtype == "auto" else getattr(torch, dtype)
    placed = {"device_map": {"": device}} if few_bits else {}
    loading = four_bits_anywhere(device) if few_bits else nullcontext()
    with load_errors(checkpoint.path, "denoiser"), loading:
        model, report = denoiser_of(checkpoint).model_class.from_pretrained(
            str(checkpoint.path),
            subfolder=checkpoint.layout.folder.rstrip("/"),
            torch_dtype=kind,
            use_safetensors=True,
            output_loading_info=True,
            **placed,
        )
    require_whole(checkpoint.path, report["missing_keys"])
    if not few_bits:
        model = model.to(device)
    return model.requires_grad_(False).eval()
