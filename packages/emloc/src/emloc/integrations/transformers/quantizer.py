"""Teach transformers to load an emulator: `quant_method: emloc` in `config.json`.

Importing this module registers the quantizer; `AutoModel….from_pretrained(emulator)` then builds the
skeleton with `LowRankLinear` where the config says so, and loads the factors like any weight. The
model is trainable by adapters, so Trainer, TRL and `peft.get_peft_model` take it as it is.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from emloc.artefacts.checkpoint import Checkpoint
from emloc.extend.family import EmulatorLayers
from emloc.integrations.transformers.skeleton import is_linear
from emloc.layers.low_rank_linear import LowRankLinear

METHOD = "emloc"


@register_quantization_config(METHOD)
class EmlocConfig(QuantizationConfigMixin):
    """Which layers are low-rank.

    Args:
        groups: `{"layers": [module names], "rank": k}`; layers of a group share the right factor,
            stored with the first.
    """

    def __init__(self, groups: list[dict[str, Any]] | None = None, **kwargs: Any) -> None:
        self.quant_method = cast(Any, METHOD)
        self.groups = groups or []
        self.modules_to_not_convert = kwargs.pop("modules_to_not_convert", None)

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it."""
        return {"quant_method": METHOD, "groups": self.groups}


def emulator_config(checkpoint: Checkpoint, layers: EmulatorLayers) -> dict[str, Any]:
    """An emulator's `config.json`: the base's, and which layers are factors."""
    groups = [{"layers": list(names), "rank": rank} for names, rank in layers.groups]
    dtype = {} if layers.dtype is None else {"dtype": layers.dtype}
    kept = {k: v for k, v in checkpoint.config.items() if not (dtype and k == "torch_dtype")}
    return {**kept, **dtype, "quantization_config": {"quant_method": METHOD, "groups": groups}}


@register_quantizer(METHOD)
class EmlocQuantizer(HfQuantizer):
    """Puts `LowRankLinear` into the skeleton before the weights are loaded."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        replace_layers(model, cast(Any, self.quantization_config).groups)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """`save_pretrained` writes the factors back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on it."""
        return True


def _sizes(dense: Any) -> tuple[int, int]:
    """`(d_in, d_out)` of a Linear or Conv1D."""
    if isinstance(dense, Conv1D):
        d_in, d_out = dense.weight.shape
        return d_in, d_out
    return dense.in_features, dense.out_features


def replace_layers(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Replace the named linear layers by empty `LowRankLinear`s of the same dtype and device.

    Raises:
        ValueError: a name is not a linear layer of the model.
    """
    for group in groups:
        shared = None
        for name in group["layers"]:
            try:
                dense: Any = model.get_submodule(name)
            except AttributeError:
                dense = None
            if dense is None or not is_linear(dense):
                raise ValueError(
                    f"The emulator's config names {name}, which is no linear layer of "
                    f"{type(model).__name__}; load it with the class that its config.json names."
                )
            layer = LowRankLinear(
                *_sizes(dense),
                group["rank"],
                bias=dense.bias is not None,
                dtype=dense.weight.dtype if dense.weight.dtype.is_floating_point else torch.float32,
                device=dense.weight.device,
                shared=shared,
                group_size=len(group["layers"]),
            )
            shared = layer.shared
            model.set_submodule(name, layer)
