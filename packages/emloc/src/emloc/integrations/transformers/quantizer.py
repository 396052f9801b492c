"""Teach transformers to load an emulator: `quant_method: emloc` in `config.json`.

Importing this module registers the quantizer; `AutoModel….from_pretrained(emulator)` then builds the
skeleton with the layers of the groups' formats where the config says so, and loads their tensors like any
weight. The model is trainable by adapters, so Trainer, TRL and `peft.get_peft_model` take it as it is.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from emloc.artefacts.checkpoint import Checkpoint
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
from emloc.formats.vocabulary import tables_of
from emloc.integrations.transformers.skeleton import is_linear
from emloc.integrations.transformers.vocabulary import replace_tables
from emloc.layers.emulated_layer import EmulatedLayer


@register_quantization_config(METHOD)
class EmlocConfig(GroupsConfig, QuantizationConfigMixin):
    """`GroupsConfig`, for transformers."""


def emulator_config(checkpoint: Checkpoint, layers: EmulatorLayers) -> dict[str, Any]:
    """An emulator's `config.json`: the base's, and the form of the compressed layers."""
    dtype = {} if layers.dtype is None else {"dtype": layers.dtype}
    kept = {k: v for k, v in checkpoint.config.items() if not (dtype and k == "torch_dtype")}
    return {
        **kept,
        **dtype,
        "quantization_config": quantization_config(layers.groups, layers.tables),
    }


@register_quantizer(METHOD)
class EmlocQuantizer(HfQuantizer):
    """Puts an emulator's layers into the skeleton before the weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        config = cast(Any, self.quantization_config)
        replace_layers(model, config.groups)
        replace_tables(model, tables_of(config.tables))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # transformers marks what it has loaded, and gives the rest memory of any content.
        refuse_missing(
            model,
            (
                f"{name}.{key}"
                for name, module in model.named_modules()
                if isinstance(module, EmulatedLayer)
                for key, tensor in module.state_dict(keep_vars=True).items()
                if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)
            ),
        )
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes the stored tensors back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True


def replace_layers(model: nn.Module, groups: Groups) -> None:
    """See `emulated_layers.replace_layers`; for linear layers, and GPT-2's Conv1D."""
    emulated_layers.replace_layers(model, groups, _dense_layer, "linear layer")


def _dense_layer(name: str, module: Any) -> DenseLayer | None:
    if not is_linear(module):
        return None
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
    else:
        d_in, d_out = module.in_features, module.out_features
    dtype = module.weight.dtype if module.weight.dtype.is_floating_point else torch.float32
    return DenseLayer(name, d_in, d_out, module.bias is not None, dtype, module.weight.device)
