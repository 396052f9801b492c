"""A LoRA that an emulator's layer computes together with itself (`FusesLora`).

PEFT's own layer works on an emulator as on any model. This one is the same layer, with the same
parameters and the same results up to rounding, whose training step costs little more than its
multiplications: a low-rank layer makes no passes between products and projects the input of a group once
for all of its LoRAs.
"""

from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from emloc.layers.emulated_layer import FusesLora


class FusedLora(LoraLinear):
    """PEFT's `lora.Linear` around a layer that computes both."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., d_in) to (..., d_out); whatever is not a plain LoRA is left to PEFT."""
        if args or kwargs or self.plain_down(x) is None:
            return super().forward(x, *args, **kwargs)
        base, name = cast(FusesLora, self.base_layer), self.active_adapters[0]
        up = cast(Tensor, self.lora_B[name].weight)
        return base.forward_with_lora(x, up, self.scaling[name])

    def plain_down(self, x: Tensor) -> Tensor | None:
        """A, r × d_in, if this layer now is one plain LoRA on a frozen layer in one dtype, else None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name, base = self.active_adapters[0], cast(FusesLora, self.base_layer)
        if name not in self.lora_A or name in self.lora_variant:
            return None
        dropout = self.lora_dropout[name]
        down, up = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        if not isinstance(dropout, nn.Identity) or up.bias is not None:
            return None
        if any(parameter.requires_grad for parameter in base.frozen_parameters()):
            return None
        # PEFT keeps LoRAs of half-precision models in float32: their products are float32 unless
        # autocast says otherwise, and stay so.
        autocast = torch.is_autocast_enabled(x.device.type)
        return down.weight if autocast or down.weight.dtype == base.product_dtype() else None


def fuse_lora(model: nn.Module) -> int:
    """Let the LoRAs on an emulator's layers compute together with these, where they can.

    Call it once on what `get_peft_model` returns, at any time. Nothing else changes: parameters, their
    names, what is saved, adapters that are added or switched later.

    Returns:
        The number of layers; 0 for a model that is no emulator.
    """
    count = 0
    for module in model.modules():
        if type(module) is LoraLinear and isinstance(module.base_layer, FusesLora):
            module.__class__ = FusedLora
            module.base_layer.attach_lora(module)
            count += 1
    return count
