"""The places of a transformers model's parameters in a checkpoint.

Most are stored under their own name. Others were renamed over the years, carry or lack the base
model's prefix, are tied to another parameter, or are assembled from several tensors (experts fused
into one). transformers keeps the rules by which `from_pretrained` resolves all that; the same rules are
applied here to names alone, so that one parameter can be read without loading the model.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from emloc.artefacts.checkpoint import Checkpoint
from emloc.extend.family import StoredParameter

_KNOWN: "weakref.WeakKeyDictionary[Any, dict[str, dict[str, StoredParameter]]]" = (
    weakref.WeakKeyDictionary()
)
_MODULES: "weakref.WeakKeyDictionary[Any, set[str]]" = weakref.WeakKeyDictionary()


def stored_parameter(model: Any, parameter: str, checkpoint: Checkpoint) -> StoredParameter | None:
    """Find how `parameter` of the skeleton is stored; None if the checkpoint does not hold it."""
    known = _KNOWN.setdefault(model, {})
    if str(checkpoint.path) not in known:
        known[str(checkpoint.path)] = _all_stored(model, checkpoint)
    return known[str(checkpoint.path)].get(parameter)


def module_name(model: Any, name: str) -> str:
    """The name that a module of an adapter has in `model`, by the renamings that its weights went through.

    PEFT puts an adapter's LoRA through the same when it loads one. A name that the model has, or that no
    renaming makes one of, stays.
    """
    modules = _modules(model)
    if name in modules:
        return name
    renamings = [
        rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)
    ]
    renamed = rename_source_key(f"{name}.weight", renamings, [])[0].removesuffix(".weight")
    return renamed if renamed in modules else name


def _modules(model: Any) -> set[str]:
    if model not in _MODULES:
        _MODULES[model] = {name for name, _ in model.named_modules()}
    return _MODULES[model]


def _all_stored(model: Any, checkpoint: Checkpoint) -> dict[str, StoredParameter]:
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    stored: dict[str, StoredParameter] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None:
            stored.setdefault(target, StoredParameter((name,), _is_transposed(model, target)))
        else:
            parts.setdefault(target, []).append((pattern, name))
    for target, sources in parts.items():
        stored.update(_converted(model, by_pattern[sources[0][0]], target, sources, checkpoint))
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for parameter, source in tied.items():
        if parameter not in stored and source in stored:
            stored[parameter] = stored[source]
        elif source not in stored and parameter in stored:
            stored[source] = stored[parameter]
    return stored


def _is_transposed(model: Any, parameter: str) -> bool:
    owner, _, leaf = parameter.rpartition(".")
    if leaf != "weight":
        return False
    try:
        return isinstance(model.get_submodule(owner), Conv1D)
    except AttributeError:
        return False


def _converted(
    model: Any,
    rule: Any,
    target: str,
    sources: Sequence[tuple[str, str]],
    checkpoint: Checkpoint,
) -> dict[str, StoredParameter]:
    """The parameters that one rule makes of its tensors; a dry run on meta tensors tells which."""
    names = tuple(name for _, name in sources)

    def convert(read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        fresh = copy.deepcopy(rule)
        for pattern, name in sources:
            fresh.add_tensor(target, name, pattern, read(name))
        made = fresh.convert(target, model=model, config=model.config)
        return {key: v[0] if isinstance(v, list) else v for key, v in made.items()}

    def empty(name: str) -> Tensor:
        info = checkpoint.tensors[name]
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    def assemble(parameter: str) -> Callable[[Callable[[str], Tensor]], Tensor]:
        return lambda read: convert(read)[parameter]

    return {
        parameter: StoredParameter(names, assemble=assemble(parameter))
        for parameter in convert(empty)
    }
