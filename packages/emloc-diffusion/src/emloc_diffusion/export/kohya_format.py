"""kohya's layout of LoRAs for UNets: `lora_unet_<module>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

A module's name is that of diffusers with `_` for `.`; text encoders begin with `lora_te_`, those of SDXL
with `lora_te1_` and `lora_te2_`. `.alpha` is a scalar and the scaling `alpha / rank`.

diffusers (0.42) loses the alphas of attention layers when it renames them, and gives them the file's most
common one. So all layers of a component get one alpha, and `B` takes the quotient. Where it is a
power of two nothing is lost; else `B` is rounded to its dtype once more (a relative 2⁻²⁴ in float32,
2⁻⁹ in bfloat16). diffusers also drops `.dora_scale`: a DoRA in this layout is for other programs.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_tensors import LoraLayer
from emloc.errors import MismatchError, NumericalError
from emloc_diffusion.export.diffusers_format import clip_name, stored_clip_name

_UNET_NAMES = re.compile(
    r"conv_in|conv_out|(time|add)_embedding\.linear_[12]|(down_blocks\.\d+|mid_block|up_blocks\.\d+)\."
    r"(attentions\.\d+\.(proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))"
    r"|resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|(down|up)samplers\.\d+\.conv)"
)
"""The layers that the layout has names for, which readers turn back into these."""

_ORIGINAL_NAMES = {
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""Under Stability AI's names, because diffusers misreads its own here."""


def kohya_file(parts: Mapping[str, Adapter]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and (empty) header of the file.

    Args:
        parts: adapters by component: `unet`, and `text_encoder`, `text_encoder_2` where there are any.

    Returns:
        Tensors by name, in the adapters' dtypes: A as `lora_down.weight` (rank × d_in, of a convolution
        rank × channels × height × width), B as `lora_up.weight` (d_out × rank, or × 1 × 1),
        `alpha` (scalar, float32), a DoRA's magnitude as `dora_scale` (d_out × 1, or × 1 × 1).

    Raises:
        MismatchError: a layer that the layout has no name for.
        NumericalError: B does not fit its dtype under the common alpha.
    """
    tensors: dict[str, Tensor] = {}
    for component, adapter in parts.items():
        prefix = _prefix(component, parts)
        shared = _shared_alpha([layer.scaling * layer.rank for layer in adapter.layers])
        for layer in adapter.layers:
            key = prefix + _name(component, adapter, layer.name).replace(".", "_")
            up = _scaled(adapter, layer, layer.scaling * layer.rank / shared)
            tensors[f"{key}.lora_down.weight"] = adapter.read(layer.down_key)
            tensors[f"{key}.lora_up.weight"] = up
            tensors[f"{key}.alpha"] = torch.tensor(shared, dtype=torch.float32)
            if layer.magnitude_key:
                magnitude = adapter.magnitude(layer.magnitude_key)
                tensors[f"{key}.dora_scale"] = magnitude.reshape(-1, *[1] * (up.ndim - 1))
        if component != "unet":
            tensors.update(_missing_out_proj(prefix, tensors))
    return tensors, {}


def _prefix(component: str, parts: Mapping[str, Adapter]) -> str:
    if component == "unet":
        return "lora_unet_"
    if component == "text_encoder_2":
        return "lora_te2_"
    return "lora_te1_" if "text_encoder_2" in parts or _reads_two_encoders(parts) else "lora_te_"


def _reads_two_encoders(parts: Mapping[str, Adapter]) -> bool:
    """Return whether the UNet's cross-attention is wider than the text encoder: SDXL, the two side by
    side.
    """
    read, written = (
        {
            parts[component].tensors.tensors[layer.down_key].shape[1]
            for layer in parts[component].layers
            if layer.name.endswith(ends)
        }
        for component, ends in (
            ("unet", ("attn2.to_k", "attn2.to_v")),
            ("text_encoder", ("q_proj", "k_proj", "v_proj", "fc1")),
        )
    )
    return bool(read and written) and max(read) > max(written)


def _name(component: str, adapter: Adapter, name: str) -> str:
    if component == "unet":
        known = _UNET_NAMES.fullmatch(name)
        other_name = _ORIGINAL_NAMES.get(name, name)
    else:
        other_name = stored_clip_name(clip_name(adapter, name))
        known = other_name != "text_projection"
    if not known:
        raise MismatchError(
            f"{adapter.path}: kohya's layout has no name for {component}.{name}; export to the format "
            f"diffusers only, or train without this layer."
        )
    return other_name


def _shared_alpha(alphas: Sequence[float]) -> float:
    """The alpha of most layers, of those from which most others differ by a power of two."""
    fraction = Counter(math.frexp(alpha)[0] for alpha in alphas).most_common(1)[0][0]
    return Counter(a for a in alphas if math.frexp(a)[0] == fraction).most_common(1)[0][0]


def _scaled(adapter: Adapter, layer: LoraLayer, quotient: float) -> Tensor:
    up = adapter.read(layer.up_key)
    if quotient == 1:
        return up
    scaled = (up.double() * quotient).to(up.dtype)
    if not torch.isfinite(scaled).all() and torch.isfinite(up).all():
        raise NumericalError(
            f"{adapter.path}: {layer.up_key} times {quotient:g} does not fit {up.dtype}, and kohya's "
            f"layout needs one alpha; export to the format diffusers only, or save it in float32."
        )
    return scaled


def _missing_out_proj(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA of zeros where attention is adapted and its output projection is not.

    diffusers knows the layout of a text encoder by these layers and misreads it when there are none. One
    is enough; CLIP's four projections all have one shape. (With DoRA zeros are not without effect, and
    diffusers does not read it anyway.)
    """
    begins = f"{prefix}text_model_encoder_layers_"
    own = [key for key in tensors if key.startswith(begins)]
    projections = [k for k in own if re.search(r"self_attn_[qkv]_proj\.lora_down\.weight$", k)]
    if not projections or any("self_attn_out_proj" in k or k.endswith(".dora_scale") for k in own):
        return {}
    beside = projections[0].removesuffix(".lora_down.weight")
    key = re.sub(r"_[qkv]_proj$", "_out_proj", beside)
    zeros = ("lora_down.weight", "lora_up.weight")
    return {
        **{f"{key}.{leaf}": torch.zeros_like(tensors[f"{beside}.{leaf}"]) for leaf in zeros},
        f"{key}.alpha": tensors[f"{beside}.alpha"].clone(),
    }
