"""The memory of training whole modules (`lora_modules_to_save`): PEFT's copies of them.

PEFT keeps the frozen module and trains a copy beside it, in the dtype that the weights are loaded in; a LoRA
is on neither. Parameters that are tied are copied apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from emloc.config import LoraOptions

Shapes = Mapping[str, tuple[int, ...]]
"""Shape by parameter."""


OF_CLASSIFIERS = ("classifier", "score")
"""Modules that PEFT trains whole unasked, where a `task_type` is of classifiers."""

TASKS = ("SEQ_CLS", "TOKEN_CLS")


def trained_whole(family: Any, options: LoraOptions) -> list[str]:
    """Ends of the names of modules that PEFT trains whole: those of the options, and a classifier's head.

    Args:
        family: may have PEFT's `task_type`.
    """
    head = OF_CLASSIFIERS if getattr(family, "task_type", None) in TASKS else ()
    return [*options.lora_modules_to_save, *head]


def whole_parameters(model: nn.Module, names: Sequence[str]) -> Shapes:
    """The parameters of the modules whose names end in one of `names`, as PEFT matches them."""
    shapes: dict[str, tuple[int, ...]] = {}
    outer: list[str] = []
    for path, module in model.named_modules():
        if not path.endswith(tuple(names)) or path.startswith(tuple(f"{name}." for name in outer)):
            continue
        outer.append(path)
        held = module.named_parameters(prefix=path)
        shapes |= {name: tuple(value.shape) for name, value in held}
    return shapes


def untied_parameters(model: nn.Module, changed: Sequence[str]) -> Shapes:
    """The tensors that a merged model stores besides the base's, where these parameters change.

    Those that share one with parameters of other names come apart (`merged_tensors`).
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    tied: dict[int, list[str]] = {}
    for name, parameter in named.items():
        tied.setdefault(id(parameter), []).append(name)
    groups = [names for names in tied.values() if not set(names).isdisjoint(changed)]
    return {name: tuple(named[name].shape) for names in groups for name in names[1:]}
