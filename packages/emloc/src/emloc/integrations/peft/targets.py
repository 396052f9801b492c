"""Which layers `lora_target_modules: all-linear` means."""

from collections.abc import Container
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers.conversion_mapping import get_model_conversion_mapping

from emloc.integrations.transformers.skeleton import is_linear
from emloc.layers.low_rank_linear import LowRankLinear
from emloc.progress import console

READ_NOT_CALLED = {
    model_type: ("out_proj", "conv1d")
    for model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
}
"""Layers of state-space models whose weight a kernel reads; PEFT refuses to adapt them."""


IN_FEW_BITS = ("Linear4bit", "Linear8bitLt")
"""bitsandbytes' linear layers, which need not be installed."""


def _in_few_bits(module: Any) -> bool:
    return type(module).__name__ in IN_FEW_BITS


def linear_targets(model: Any, excluded: Container[str] = ()) -> list[str]:
    """Names of all linear layers that PEFT adapts as such, the output head left out.

    Args:
        excluded: modules that are not adapted.

    PEFT's own `all-linear` would, in mixture-of-experts models, also adapt the experts that
    transformers fuses into one parameter, and whatever else bears their names; those an emulator
    leaves dense.
    """
    head = model.get_output_embeddings()
    refused = READ_NOT_CALLED.get(model.config.model_type, ())
    names = [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or isinstance(module, LowRankLinear) or _in_few_bits(module))
        and module is not head
        and name.rpartition(".")[2] not in refused
        and name not in excluded
    ]
    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    kept = set(config.target_modules or ())
    dropped = [name for name in names if name not in kept]
    if dropped:
        console.print(
            f"{len(dropped)} layers are not adapted, because PEFT takes their names for those of fused "
            f"experts: {dropped[0]}, …"
        )
    return [name for name in names if name in kept]
