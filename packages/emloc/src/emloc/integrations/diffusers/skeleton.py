"""A diffusers model without its weights, and what one traced forward tells of it.

Parameters are on the meta device, buffers are real. The trace runs on fake tensors: nothing is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.read_errors import reading
from emloc.integrations.empty_weights import empty_weights

Forward = Callable[[Any], object]


def empty_model(checkpoint: Checkpoint, model_class: Any, dtype: torch.dtype) -> nn.Module:
    """The class's model for a checkpoint's config on meta, in eval mode.

    Raises:
        CheckpointError: diffusers cannot build it.
    """
    config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    what = f"{checkpoint.name}: its {checkpoint.layout.config}"
    hint = "check that it is complete, and that the installed diffusers knows the model"
    with reading(what, "does not describe a diffusers model", hint), empty_weights():
        model = model_class.from_config(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a linear layer or a 2-d convolution that low-rank layers can replace."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module._conv_forward.__func__ is nn.Conv2d._conv_forward
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def units(model: nn.Module) -> list[str]:
    """Elements of module lists that hold layers and no list of elements of their own.

    So of a UNet the single resnets and transformer blocks and not its levels, of a transformer its
    blocks. A list inside such an element (the parts of a feed-forward) belongs to it.
    """
    unit_names: list[str] = []

    def visit(name: str, module: nn.Module, in_list: bool) -> None:
        lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
        if in_list and not lists:
            if any(is_layer(sub) for sub in module.modules()):
                unit_names.append(name)
            return
        for child, sub in module.named_children():
            below = f"{name}.{child}" if name else child
            if isinstance(sub, nn.ModuleList):
                for index, element in sub.named_children():
                    visit(f"{below}.{index}", element, True)
            else:
                visit(below, sub, False)

    visit("", model, False)
    return unit_names


@dataclass(frozen=True)
class Trace:
    """The record of one forward.

    Attributes:
        order: the modules that were asked for, in the order of their first call.
        inputs: per linear layer that was called once, a number that is the same for the same tensor.
    """

    order: Sequence[str]
    inputs: dict[str, int]


def trace(model: Any, modules: Sequence[str], layers: Sequence[str], forward: Forward) -> Trace:
    """Run `forward` on a fake copy of the model."""
    order: dict[str, None] = {}
    inputs: dict[str, list[int]] = {}
    kept: list[Any] = []  # so that no tensor's identity is used twice

    def ordering(name: str) -> Callable[..., None]:
        return lambda *_: order.setdefault(name)

    def recording(name: str) -> Callable[..., None]:
        def record(_: nn.Module, given: tuple[Any, ...]) -> None:
            kept.append(given[0])
            inputs.setdefault(name, []).append(id(given[0]))

        return record

    config = {k: v for k, v in model.config.items() if k != "quantization_config"}
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        fake = type(model).from_config(config).eval()
        for name in modules:
            fake.get_submodule(name).register_forward_pre_hook(ordering(name))
        for name in layers:
            fake.get_submodule(name).register_forward_pre_hook(recording(name))
        forward(fake)
    return Trace(list(order), {name: ids[0] for name, ids in inputs.items() if len(ids) == 1})
