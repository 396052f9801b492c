"""Teach diffusers to load an emulator: `quant_method: emloc` in a component's `config.json`.

Importing this module registers the quantizer; `UNet2DConditionModel.from_pretrained`, and that of every
other model and pipeline, then builds the skeleton with the layers of the groups' formats where the config
says so and loads their tensors like any weight. The model is trainable by adapters and may be cast and
saved as a dense one. diffusers itself loads what has a quantizer with `low_cpu_mem_usage` alone, its
default.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Any, cast

from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from emloc.extend import emulated_layers
from emloc.extend.emulated_layers import (
    METHOD,
    Groups,
    GroupsConfig,
    quantization_config,
    refuse_missing,
)
from emloc.extend.family import EmulatorLayers
from emloc.formats.layer_format import DenseLayer
from emloc.linalg.convolution import matrix_shape


class Method(str, Enum):
    """The quantization method, with the `value` that diffusers asks every method for."""

    EMLOC = METHOD


class EmlocConfig(GroupsConfig, QuantizationConfigMixin):
    """`GroupsConfig`, for diffusers."""

    quant_method: Any = Method.EMLOC


def emulator_config(checkpoint_config: Mapping[str, Any], layers: EmulatorLayers) -> dict[str, Any]:
    """An emulator's `config.json`: the base's, and the form of the compressed layers.

    diffusers' configs hold no dtype: `torch_dtype` decides at loading, float32 without it.
    """
    return {**checkpoint_config, "quantization_config": quantization_config(layers.groups)}


class EmlocQuantizer(DiffusersQuantizer):
    """Puts an emulator's layers into the skeleton before the weights are loaded."""

    requires_calibration = True
    use_keep_in_fp32_modules = True  # as without a quantizer

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        replace_layers(model, cast(EmlocConfig, self.quantization_config).groups)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # diffusers refuses to cast what is quantized. Stored tensors are weights like any other, and the
        # training scripts of diffusers cast the model that they have loaded.
        model.is_quantized = False
        return model

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        """The same keys, when none is of an emulated layer; see `refuse_missing`."""
        refuse_missing(model, missing_keys)
        return missing_keys

    def get_cuda_warm_up_factor(self) -> int:
        """2, in diffusers' terms: the weights take the memory that their skeleton says."""
        return 2

    @property
    def is_serializable(self) -> bool:
        """`save_pretrained` writes the stored tensors back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = cast(Any, EmlocConfig)
AUTO_QUANTIZER_MAPPING[METHOD] = cast(Any, EmlocQuantizer)


def replace_layers(model: nn.Module, groups: Groups) -> None:
    """See `emulated_layers.replace_layers`; for linear layers and 2-d convolutions."""
    kinds = "linear layer or 2-d convolution"
    emulated_layers.replace_layers(model, groups, _dense_layer, kinds)


def _dense_layer(name: str, module: nn.Module) -> DenseLayer | None:
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return None
    weight, bias = module.weight, module.bias is not None
    d_out, d_in = matrix_shape(weight.shape)
    convolution = module if isinstance(module, nn.Conv2d) else None
    return DenseLayer(name, d_in, d_out, bias, weight.dtype, weight.device, convolution)
