"""The layers of a model that become something else: one decision for compress and for the planner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from emloc.compression.groups import CompressionPlan, Shape, make_plan
from emloc.compression.vocabulary import tables_in
from emloc.config import CompressConfig
from emloc.errors import ConfigError
from emloc.extend.capabilities import kept_dense_of
from emloc.options.patterns import match_pattern, require_matching
from emloc.options.types import Dtype
from emloc.streaming.stream import UnitStream


def choose_groups(
    name: str,
    model: nn.Module,
    blocks: Sequence[str],
    layer_groups: Sequence[Sequence[str]],
    kept: Mapping[str, str],
    config: CompressConfig,
    shape_of: Callable[[str], Shape | None],
    itemsize_of: Callable[[str], int],
) -> CompressionPlan:
    """The plan for a model, with the reason for every large weight that stays dense.

    Args:
        name: of the model, for messages.
        model: the skeleton.
        blocks: the repeated units.
        layer_groups, kept: see `ModelFamily`.
        shape_of, itemsize_of: see `make_plan`.

    Raises:
        ConfigError: nothing can be compressed, or options do not fit the model.
    """
    included = _included(name, blocks, kept, config)
    groups = [*layer_groups, *([layer] for layer in included)]
    plan = make_plan(groups, shape_of, config, itemsize_of)
    plan.kept_dense.update({layer: why for layer, why in kept.items() if layer not in included})
    plan.kept_dense.update(_other_weights(model, blocks, plan))
    if not plan.groups:
        reasons = sorted(set(plan.kept_dense.values()))
        why = "; ".join(reasons) or "it has no linear layers in blocks"
        raise ConfigError(f"No layer of {name} can be compressed: {why}.")
    return plan


def choose_streamed(stream: UnitStream, config: CompressConfig) -> CompressionPlan:
    """`choose_groups` and `choose_tables` for a streamed model."""
    tables = tables_in(stream, config.embedding_bits)
    plan = choose_groups(
        stream.checkpoint.name,
        stream.model,
        stream.blocks,
        stream.family.layer_groups(stream.model),
        kept_dense_of(stream.family, stream.model),
        config,
        stream.layer_shape,
        streamed_itemsize(stream, config.dtype),
    )
    return replace(plan, tables=tables)


def streamed_itemsize(stream: UnitStream, dtype: Dtype) -> Callable[[str], int]:
    """Bytes of an element of a layer's weight in an emulator of a streamed model."""

    def itemsize(layer: str) -> int:
        stored = stream.checkpoint.tensors[stream.weight_name(layer)].dtype
        return emulator_dtype(stored, dtype).itemsize

    return itemsize


def emulator_dtype(stored: torch.dtype, dtype: Dtype) -> torch.dtype:
    """The dtype in the emulator of a tensor that the base stores; `auto` keeps it."""
    keep = dtype == "auto" or not stored.is_floating_point
    return stored if keep else getattr(torch, dtype)


def _included(
    name: str, blocks: Sequence[str], kept: Mapping[str, str], config: CompressConfig
) -> Sequence[str]:
    """Layers that the family keeps dense and the options want compressed."""
    require_matching("include", config.include, list(kept))
    wanted = dict.fromkeys(config.include, True)
    layers = [layer for layer in kept if match_pattern(wanted, layer)]
    for layer in layers:
        if not any(layer.startswith(f"{block}.") for block in blocks):
            raise ConfigError(
                f"include: {layer} is in no block of {name} ({kept[layer]}), so it stays dense; leave it "
                f"out."
            )
    return layers


def _other_weights(
    model: nn.Module, blocks: Sequence[str], plan: CompressionPlan
) -> dict[str, str]:
    """Large weights of blocks that belong to no linear layer, such as experts fused in one tensor."""
    layers = {name for group in plan.groups for name in group.layers} | plan.kept_dense.keys()
    return {
        name: "no linear layer"
        for block in blocks
        for name, parameter in model.get_submodule(block).named_parameters(prefix=block)
        if parameter.ndim >= 3 and name.rpartition(".")[0] not in layers
    }
