"""Teach transformers to load a pruned model: `quant_method: emloc_pruned` in `config.json`.

Importing this module registers the format; `AutoModel….from_pretrained(folder)` then shrinks the linear
layers of each block to what is left of them, tells its attention how many heads it has, and loads the
weights like any. The scale of the attention's scores stays that of the full head.

Where head dimensions were taken out, an attention keeps its dimensions of the rotation, and a norm over
them still divides by the number that there were: those that went are zeros, and zeros count in a mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from emloc.errors import ConfigError
from emloc_baselines.kept import Kept, as_text, numbers
from emloc_baselines.structures import Attention, Mlp, attention_at, mlp_at

METHOD = "emloc_pruned"


@register_quantization_config(METHOD)
class PrunedConfig(QuantizationConfigMixin):
    """The sizes that are left of every pruned module.

    Args:
        attentions: module name to `groups` (key-value heads) and `dims` (head dimensions, `0-3,7`).
        mlps: module name to its number of neurons.
    """

    def __init__(
        self,
        attentions: Mapping[str, Mapping[str, Any]] | None = None,
        mlps: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = cast(Any, METHOD)
        self.attentions = dict(attentions or {})
        self.mlps = dict(mlps or {})
        self.modules_to_not_convert = kwargs.pop("modules_to_not_convert", None)

    def to_dict(self) -> dict[str, Any]:
        """The entry in `config.json`."""
        return {"quant_method": METHOD, "attentions": self.attentions, "mlps": self.mlps}


def pruned_config(config: Mapping[str, Any], kept: Sequence[Kept]) -> dict[str, Any]:
    """A pruned model's `config.json`: the base's, and what is left of each block."""
    attentions = {
        k.structures.attention.name: {"groups": len(k.groups), "dims": as_text(k.dims)}
        for k in kept
    }
    mlps = {k.structures.mlp.name: len(k.neurons) for k in kept}
    quantization = {"quant_method": METHOD, "attentions": attentions, "mlps": mlps}
    return {**config, "quantization_config": quantization}


@register_quantizer(METHOD)
class PrunedQuantizer(HfQuantizer):
    """Shrinks the skeleton before the weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        shrink(model, cast(PrunedConfig, cast(Any, self).quantization_config))
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`save_pretrained` writes the weights back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters can be trained on it."""
        return True


def shrink(model: nn.Module, config: PrunedConfig) -> None:
    """Replace the layers of every named module by empty smaller ones of the same dtype and device.

    Raises:
        ValueError: the model has no such attention or MLP.
    """
    for name, left in config.attentions.items():
        attention = attention_at(model, name)
        if attention is None:
            raise ValueError(_foreign(model, name))
        _shrink_attention(model, attention, int(left["groups"]), numbers(left["dims"]))
    for name, neurons in config.mlps.items():
        mlp = mlp_at(model, name)
        if mlp is None:
            raise ValueError(_foreign(model, name))
        _shrink_mlp(model, mlp, neurons)


def _foreign(model: nn.Module, name: str) -> str:
    return (
        f"The pruned model's config names {name}, which is not such a part of {type(model).__name__}; load "
        f"it with the class that its config.json names."
    )


def _shrink_attention(model: nn.Module, attention: Attention, groups: int, dims: list[int]) -> None:
    heads, size = groups * attention.queries, len(dims)
    _resize(model, attention.query, rows=heads * size)
    for layer in (attention.key, attention.value):
        _resize(model, layer, rows=groups * size)
    _resize(model, attention.output, columns=heads * size)
    module: Any = model.get_submodule(attention.name)
    for attribute, value in (
        ("head_dim", size), ("attention_head_size", size), ("num_heads", heads), ("n_heads", heads),
        ("num_attention_heads", heads), ("num_key_value_heads", groups), ("embed_dim", heads * size),
        ("all_head_size", heads * size),
    ):  # fmt: skip
        if hasattr(module, attribute):
            setattr(module, attribute, value)
    for norm, layer in attention.norms:
        _shrink_norm(model, norm, attention, model.get_submodule(layer), size)
    if attention.paired and size < attention.head_dim:
        module.register_forward_pre_hook(_with_own_positions(dims), with_kwargs=True)


def _shrink_mlp(model: nn.Module, mlp: Mlp, neurons: int) -> None:
    for name in mlp.inputs:
        _resize(model, name, rows=neurons)
    _resize(model, mlp.output, columns=neurons)


def _resize(
    model: nn.Module, name: str, rows: int | None = None, columns: int | None = None
) -> None:
    old: Any = model.get_submodule(name)
    dtype = old.weight.dtype if old.weight.dtype.is_floating_point else torch.float32
    new = nn.Linear(
        old.in_features if columns is None else columns,
        old.out_features if rows is None else rows,
        bias=old.bias is not None,
        dtype=dtype,
        device=old.weight.device,
    )
    model.set_submodule(name, new)


def _shrink_norm(model: nn.Module, norm: str, attention: Attention, layer: Any, size: int) -> None:
    """Give the norm of queries or keys the weights that are left."""
    old: Any = model.get_submodule(norm)
    per_head = old.weight.numel() == attention.head_dim
    left = size if per_head else layer.out_features
    if left == old.weight.numel():
        return
    model.set_submodule(norm, ShrunkRMSNorm(old, left))


class ShrunkRMSNorm(nn.Module):
    """`w · x / sqrt(Σ x² / n + ε)` where n is how many there were, and x what is left of them."""

    def __init__(self, old: Any, left: int) -> None:
        super().__init__()
        if not type(old).__name__.endswith("RMSNorm"):
            raise ConfigError(
                f"Parts of a {type(old).__name__} cannot be removed, only those of an RMS norm; prune with "
                f"a method that leaves queries and keys whole."
            )
        self.full = old.weight.numel()
        self.epsilon = float(getattr(old, "variance_epsilon", getattr(old, "eps", 1e-6)))
        self.weight = nn.Parameter(
            torch.empty(left, dtype=old.weight.dtype, device=old.weight.device)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; in float32, as transformers does."""
        high = x.float()
        scale = torch.rsqrt(high.square().sum(-1, keepdim=True) / self.full + self.epsilon)
        return self.weight * (high * scale).to(x.dtype)


def _with_own_positions(dims: list[int]) -> Any:
    """Give an attention the angles of the dimensions that it has left."""
    # A list: models are built under a device that holds no values.

    def choose(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        def own(rotation: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(part[..., dims] for part in rotation)

        if named.get("position_embeddings") is not None:
            named = {**named, "position_embeddings": own(named["position_embeddings"])}
        elif len(inputs) > 1:
            inputs = (inputs[0], own(inputs[1]), *inputs[2:])
        return inputs, named

    return choose
