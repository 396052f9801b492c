"""The layers that a LoRA goes on; PEFT is imported only where a model is at hand."""

from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from emloc.config import LoraOptions, nearest
from emloc.errors import ConfigError
from emloc.integrations.peft.blocks import in_chosen_blocks
from emloc.integrations.transformers.skeleton import is_linear
from emloc.layers.emulated_layer import EmulatedLayer
from emloc.machine.progress import console

READ_NOT_CALLED = {
    model_type: ("out_proj", "conv1d")
    for model_type in ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
}
"""Layers of state-space models whose weight a kernel reads; PEFT refuses to adapt them."""


def linear_layers(model: Any, excluded: Container[str] = ()) -> list[str]:
    """Names of all linear layers, the output head left out.

    Args:
        excluded: modules that are not adapted.
    """
    head = model.get_output_embeddings()
    refused = READ_NOT_CALLED.get(model.config.model_type, ())
    return [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or _is_emulated(module) or _in_few_bits(module))
        and module is not head
        and name.rpartition(".")[2] not in refused
        and name not in excluded
    ]


IN_FEW_BITS = ("Linear4bit", "Linear8bitLt")
"""bitsandbytes' linear layers, which need not be installed."""


def _is_emulated(module: Any) -> bool:
    return isinstance(module, EmulatedLayer) and isinstance(module, nn.Linear)


def _in_few_bits(module: Any) -> bool:
    return type(module).__name__ in IN_FEW_BITS


def linear_targets(model: Any, excluded: Container[str] = ()) -> list[str]:
    """Select from `linear_layers` those that PEFT adapts as such.

    PEFT's own `all-linear` would, in mixture-of-experts models, also adapt the experts that
    transformers fuses into one parameter, and whatever else bears their names; those an emulator
    leaves dense.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    names = linear_layers(model, excluded)
    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, get_model_conversion_mapping(model))
    kept: set[str] = set(config.target_modules or ())
    dropped = [name for name in names if name not in kept]
    if dropped:
        console.print(
            f"{len(dropped)} layers are not adapted, because PEFT mistakes their names for those of fused "
            f"experts: {dropped[0]}, …"
        )
    return [name for name in names if name in kept]


def chosen_targets(
    config: LoraOptions,
    model: Any,
    excluded: Container[str],
    all_linear: Callable[[Any, Container[str]], list[str]] = linear_targets,
) -> Sequence[str]:
    """Names as the user gave them, or all linear layers; those of the blocks asked for.

    Raises:
        ConfigError: a target or block does not exist, or nothing is left of them; or it has no LoRA that
            could be corrected and merged.
    """
    names = [name for name, _ in model.named_modules()]
    wanted = config.lora_target_modules
    for target in [*([] if wanted == ["all-linear"] else wanted), *config.lora_modules_to_save]:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            hint = nearest(target, sorted({name.rpartition(".")[2] for name in names}))
            raise ConfigError(f"lora_target_modules: the model has no module {target}.{hint}")
    chosen = all_linear(model, excluded) if wanted == ["all-linear"] else wanted
    blocks = config.lora_layers_to_transform
    if not blocks and not config.lora_layers_pattern and not excluded:
        _refuse_what_is_not_merged(model, chosen)
        return chosen
    ends = tuple(f".{target}" for target in chosen)
    targets = [
        name for name in names if name not in excluded and (name in chosen or name.endswith(ends))
    ]
    if not targets:
        if not chosen:
            raise ConfigError(
                "Every part of the model is frozen, so no LoRA has a place; unfreeze one."
            )
        raise ConfigError(f"lora_target_modules: all of {', '.join(chosen)} lie in frozen parts.")
    targets = in_chosen_blocks(model, targets, config)
    if not targets:
        raise ConfigError(f"lora_layers_to_transform: no target is in the blocks {blocks}.")
    _refuse_what_is_not_merged(model, targets)
    return targets


def _refuse_what_is_not_merged(model: nn.Module, chosen: Sequence[str]) -> None:
    """Say before the first step, and not after the last, what no stage could go on with."""
    ends = tuple(f".{target}" for target in chosen)
    for name, module in model.named_modules():
        if name not in chosen and not name.endswith(ends):
            continue
        if isinstance(module, nn.Embedding):
            raise ConfigError(
                f"lora_target_modules: {name} is an embedding, and LoRAs on embeddings are not supported; "
                f"train it whole with lora_modules_to_save, or leave it out."
            )
        if getattr(module, "groups", 1) != 1:
            raise ConfigError(
                f"lora_target_modules: {name} is a convolution of {module.groups} groups, on which LoRAs are "
                f"not supported; leave it out."
            )
