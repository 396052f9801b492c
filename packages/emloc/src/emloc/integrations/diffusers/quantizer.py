"""Teach diffusers to load an emulator: `quant_method: emloc` in a component's `config.json`.

Importing this module registers the quantizer; `UNet2DConditionModel.from_pretrained`, and that of every
other model and pipeline, then builds the skeleton with low-rank layers where the config says so and loads
the factors like any weight. The model is trainable by adapters and may be cast and saved as a dense one.
diffusers itself loads what has a quantizer with `low_cpu_mem_usage` alone, its default.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, cast

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from emloc.errors import CheckpointError, MismatchError
from emloc.extend.family import EmulatorLayers
from emloc.layers.low_rank_conv import LowRankConv2d
from emloc.layers.low_rank_linear import LowRankLinear, SharedProjection


class Method(str, Enum):
    """The quantization method, with the `value` that diffusers asks every method for."""

    EMLOC = "emloc"


METHOD = Method.EMLOC.value


class EmlocConfig(QuantizationConfigMixin):
    """Which layers are low-rank.

    Args:
        groups: `{"layers": [module names], "rank": k}`; linear layers of a group share the right factor,
            stored with the first; a convolution is a group of its own.
    """

    def __init__(self, groups: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.quant_method = cast(Any, Method.EMLOC)
        self.groups = groups or []

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it."""
        return {"quant_method": METHOD, "groups": self.groups}

    def __repr__(self) -> str:  # the parent's needs a method that it lacks
        return f"EmlocConfig({len(self.groups)} groups)"


def emulator_config(checkpoint_config: Mapping[str, Any], layers: EmulatorLayers) -> dict[str, Any]:
    """An emulator's `config.json`: the base's, and which layers are factors.

    diffusers' configs hold no dtype: `torch_dtype` decides at loading, float32 without it.
    """
    groups = [{"layers": list(names), "rank": rank} for names, rank in layers.groups]
    return {**checkpoint_config, "quantization_config": {"quant_method": METHOD, "groups": groups}}


class EmlocQuantizer(DiffusersQuantizer):
    """Puts low-rank layers into the skeleton before the weights are loaded."""

    requires_calibration = True
    use_keep_in_fp32_modules = True  # as without a quantizer

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        replace_layers(model, cast(EmlocConfig, self.quantization_config).groups)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # diffusers refuses to cast what is quantized. Factors are weights like any other, and the
        # training scripts of diffusers cast the model that they have loaded.
        model.is_quantized = False
        return model

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """The same keys, when no factor is among them.

        Raises:
            CheckpointError: one is; diffusers would go on without its values.
        """
        groups = cast(EmlocConfig, self.quantization_config).groups
        layers = {name for group in groups for name in group["layers"]}
        for key in missing_keys:
            layer, _, kind = key.rpartition(".")
            if layer in layers and kind in ("left", "right"):
                raise CheckpointError(
                    f"The emulator's config says that {layer} of {type(model).__name__} is low-rank, but "
                    f"its weights hold no {key}; compress the base model again."
                )
        return missing_keys

    def get_cuda_warm_up_factor(self) -> int:
        """2, in diffusers' terms: the weights take the memory that their skeleton says."""
        return 2

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` writes the factors back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = cast(Any, EmlocConfig)
AUTO_QUANTIZER_MAPPING[METHOD] = cast(Any, EmlocQuantizer)


def replace_layers(model: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
    """Replace the named linears and convolutions by empty low-rank ones of the same dtype and device.

    Args:
        model: changed in place; a layer that it holds under several names is replaced under all.
        groups: as in `EmlocConfig`.

    Raises:
        ConfigError: a convolution is grouped.
        MismatchError: a name is no linear layer or 2-d convolution of the model, or a convolution
            shares a right factor.
    """
    holders: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                holders.setdefault(child, []).append((parent, name))
    for group in groups:
        shared = None
        for name in group["layers"]:
            dense = _dense_layer(model, name)
            if isinstance(dense, nn.Linear):
                layer = _low_rank_linear(dense, group, shared)
                shared = layer.shared
            elif len(group["layers"]) == 1:
                layer = LowRankConv2d.like(dense, group["rank"])
            else:
                raise MismatchError(
                    f"The emulator's config lets the convolution {name} share a right factor with "
                    f"{len(group['layers']) - 1} other layers, but only linear layers can; compress the "
                    f"base model again."
                )
            layer.train(dense.training)
            for parent, attribute in holders[dense]:
                setattr(parent, attribute, layer)


def _low_rank_linear(
    dense: nn.Linear, group: Mapping[str, Any], shared: SharedProjection | None
) -> LowRankLinear:
    return LowRankLinear(
        dense.in_features,
        dense.out_features,
        group["rank"],
        bias=dense.bias is not None,  # pyright: ignore[reportUnnecessaryComparison]
        dtype=dense.weight.dtype,
        device=dense.weight.device,
        shared=shared,
        group_size=len(group["layers"]),
    )


def _dense_layer(model: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    named_twice = isinstance(found, (LowRankLinear, LowRankConv2d))
    if isinstance(found, (nn.Linear, nn.Conv2d)) and not named_twice:
        return found
    if named_twice:
        raise MismatchError(
            f"The emulator's config names {name} twice; compress the base model again."
        )
    raise MismatchError(
        f"The emulator's config names {name}, which is no linear layer or 2-d convolution of "
        f"{type(model).__name__}; load it with the class that its config.json names."
    )
