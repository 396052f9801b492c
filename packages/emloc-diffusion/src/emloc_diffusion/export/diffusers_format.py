"""The layout of `pipe.load_lora_weights`: `unet.<module>.lora_A.weight` and the like, one file for all.

The layout has no place for alpha beside the tensors: a loader takes every layer's scaling to be 1, save
diffusers from 0.34 on, which reads PEFT's own settings from the safetensors header. So the scaling goes
where most will find it. A power of two is multiplied into `B`, which changes exponents only and loses
nothing, and the file is right for everybody. Any other stays in the header, exact for diffusers.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emloc.artefacts.adapter import Adapter
from emloc.errors import MismatchError

METADATA_KEY = "lora_adapter_metadata"
"""The key that diffusers looks for in the header: a JSON object, its keys prefixed by the component."""


def diffusers_file(parts: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of the file.

    Args:
        parts: adapters by component (`unet`, `text_encoder`, …).

    Returns:
        Tensors by name, in the adapters' shapes and dtypes, and the header's metadata.

    Raises:
        MismatchError: a text encoder that pipelines do not load a LoRA into.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, adapter in parts.items():
        encoder = component.startswith("text_encoder")
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for layer in adapter.layers:
            name = clip_name(adapter, layer.name) if encoder else layer.name
            key = f"{component}.{stored_clip_name(name) if encoder else name}"
            up, scaling = _fold(adapter.read(layer.up_key), layer.scaling)
            tensors[f"{key}.lora_A.weight"] = adapter.read(layer.down_key)
            tensors[f"{key}.lora_B.weight"] = up
            if layer.magnitude_key:
                # With .weight, which PEFT leaves out: without it, transformers finds no place for it.
                tensors[f"{key}.lora_magnitude_vector.weight"] = adapter.read(layer.magnitude_key)
            ranks[name], alphas[name] = layer.rank, scaling * layer.rank
        # Patterns are regular expressions for the end of a name. A denoiser's begin with ^, as its
        # proj_out must not match those of its blocks; a text encoder's names may have text_model before.
        start = "" if encoder else "^"
        rank, alpha = (
            Counter(counted.values()).most_common(1)[0][0] for counted in (ranks, alphas)
        )
        kind = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {start + re.escape(n): v for n, v in ranks.items() if v != rank},
            "alpha_pattern": {start + re.escape(n): v for n, v in alphas.items() if v != alpha},
            "target_modules": sorted(ranks),
            "use_dora": any(layer.magnitude_key for layer in adapter.layers),
        }
        settings.update({f"{component}.{option}": value for option, value in kind.items()})
    # One entry alone: safetensors writes several in an order of its own, and files could not be compared.
    return tensors, {METADATA_KEY: json.dumps(settings, sort_keys=True)}


def _fold(up: Tensor, scaling: float) -> tuple[Tensor, float]:
    """`B` and the scaling that is left to do: 1 where `B` takes it without loss."""
    if abs(math.frexp(scaling)[0]) == 0.5:
        scaled = up * scaling
        if torch.equal(scaled / scaling, up):  # no underflow, no overflow, no NaN
            return scaled, 1.0
    return up, scaling


def clip_name(adapter: Adapter, name: str) -> str:
    """A module's name in CLIP's text encoder, without the `text_model.` that some versions put before.

    Raises:
        MismatchError: it is not CLIP's; of all text encoders, pipelines load a LoRA into CLIP only.
    """
    bare = name.removeprefix("text_model.")
    if not bare.startswith("encoder.layers.") and bare != "text_projection":
        raise MismatchError(
            f"{adapter.path}: {name} is not a layer of CLIP's text encoder, the only one that pipelines "
            f"load a LoRA into; leave this text encoder's adapter out."
        )
    return bare


def stored_clip_name(bare: str) -> str:
    """The name that published files have; every version of diffusers and transformers reads it."""
    return bare if bare == "text_projection" else f"text_model.{bare}"
