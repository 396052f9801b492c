"""The blocks that a LoRA goes on, by their numbers in a stack, as PEFT's `layers_to_transform` counts them.

A stack is a `ModuleList` that lies in no other one and holds layers to adapt. A model with several (two
towers, FLUX's double and single blocks, the ends of a UNet) numbers each from 0, so the stack must be named:
`lora_layers_pattern`, PEFT's `layers_pattern`, which may also name stacks inside of others.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from emloc.config import LoraOptions
from emloc.errors import ConfigError

Stacks = Mapping[str, int]
"""Number of blocks by name."""


def in_chosen_blocks(model: nn.Module, names: Sequence[str], options: LoraOptions) -> list[str]:
    """Select the `names` that lie in the blocks asked for; all where no blocks are.

    Raises:
        ConfigError: there is no such block, or several stacks that it may be of; the stacks are listed.
    """
    numbers, patterns = options.lora_layers_to_transform, options.lora_layers_pattern
    if not numbers:
        if patterns:
            raise ConfigError(
                "lora_layers_pattern says in which stack lora_layers_to_transform counts blocks; pass both."
            )
        return list(names)
    stacks = _stacks(model, names)
    chosen = _named(stacks, patterns) if patterns else _outermost(stacks)
    if len(chosen) != 1 and not patterns:
        several = "has no stack of blocks" if not chosen else "numbers several stacks of blocks"
        raise ConfigError(
            f"lora_layers_to_transform: the model {several} that are adapted; name one with "
            f"lora_layers_pattern: {_listed(chosen or stacks)}."
        )
    for number in numbers:
        if not any(number < count for count in chosen.values()):
            raise ConfigError(
                f"lora_layers_to_transform: there is no block {number} in {_listed(chosen)}."
            )
    return [name for name in names if _number(name, chosen) in numbers]


def _stacks(model: nn.Module, names: Sequence[str]) -> Stacks:
    """Every list that holds some of `names`, outer ones first."""
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(name.startswith(f"{path}.") for name in names)
    }


def _outermost(stacks: Stacks) -> Stacks:
    return {
        path: count
        for path, count in stacks.items()
        if not any(path.startswith(f"{other}.") for other in stacks)
    }


def _named(stacks: Stacks, patterns: Sequence[str]) -> Stacks:
    """The stacks whose names are, or end in, one of the patterns."""
    stacks_by_name: dict[str, int] = {}
    for pattern in patterns:
        ending = {
            path: count
            for path, count in stacks.items()
            if path == pattern or path.endswith(f".{pattern}")
        }
        if not ending:
            raise ConfigError(
                f"lora_layers_pattern: no stack of blocks is called {pattern}; the stacks are "
                f"{_listed(stacks)}."
            )
        stacks_by_name |= ending
    return _outermost(stacks_by_name)


def _number(name: str, stacks: Stacks) -> int | None:
    """The number of the block in its stack that a layer lies in."""
    for path in stacks:
        if name.startswith(f"{path}."):
            return int(name.removeprefix(f"{path}.").partition(".")[0])
    return None


def _listed(stacks: Stacks) -> str:
    return ", ".join(f"{path} (0 to {count - 1})" for path, count in stacks.items()) or "none"
