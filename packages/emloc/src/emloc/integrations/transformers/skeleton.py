"""A transformers model without its weights, and what can be learnt from it.

Parameters are on the meta device; buffers (rotary frequencies and the like) are real, since no
checkpoint stores them.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.read_errors import reading
from emloc.integrations.empty_weights import empty_weights
from emloc.layers.emulated_layer import EmulatedLayer

LIKE_LINEAR = frozenset({"FalconLinear"})
"""Subclasses of nn.Linear with a forward of their own that computes the same."""

OF_BITSANDBYTES = frozenset({"Linear4bit", "Linear8bitLt"})
"""Linear layers as bitsandbytes holds them."""


def empty_model(checkpoint: Checkpoint, auto_class: Any, dtype: torch.dtype) -> nn.Module:
    """The model class of a checkpoint's config on meta, in eval mode.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    hint = "check that it is complete, and that the installed transformers knows the model"
    with reading(
        f"{checkpoint.name}: its config.json", "does not describe a transformers model", hint
    ):
        config = model_config(checkpoint)
        # An emulator is described by its dense layers here; the others are core's business.
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with no_init_weights(), empty_weights():
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=False)
    _widen(model, dtype)
    model.tie_weights()  # what is tied is one parameter, which moving to meta had made several
    _report_real_device(model)
    return model.eval()


def _widen(model: Any, dtype: torch.dtype) -> None:
    """Have in float32 what `from_pretrained` would have in it, whatever dtype is asked for."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    pattern, _, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and pattern.search(name):
            tensor.data = tensor.data.float()


def keep_no_keys(model: nn.Module) -> None:
    """Have forwards begin without keys and values of earlier ones, unless a call asks for them.

    Where a block runs again on the same inputs, it would read those of its first run beside its own.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def _report_real_device(model: nn.Module) -> None:
    """Let `model.device` be where it computes: some models move their inputs there, and not to meta."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__class__ = _with_real_device(type(module))


@cache
def _with_real_device(kind: type) -> type:
    """The class with the device of its buffers that are not on meta, or the CPU; one for each class."""

    def device(module: nn.Module) -> torch.device:
        real = (buffer.device for buffer in module.buffers() if buffer.device.type != "meta")
        return next(real, torch.device("cpu"))

    return type(kind.__name__, (kind,), {"device": property(device), "__module__": kind.__module__})


def model_config(checkpoint: Checkpoint) -> Any:
    """transformers' config of a checkpoint."""
    if not checkpoint.translated:
        return AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    content = dict(checkpoint.config)
    return AutoConfig.for_model(content.pop("model_type"), **content)


def repeated_blocks(model: nn.Module) -> list[str]:
    """Names of the modules in every `ModuleList` that is not inside another one and holds linears.

    These are the units that stream. A list inside a block (experts) is part of the block. An emulator has
    those of its base.
    """
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        nested = any(name.startswith(f"{block}.") for block in blocks)
        if len(module) > 0 and not nested:
            children = [(child, sub) for child, sub in module.named_children() if _has_linear(sub)]
            blocks += [f"{name}.{child}" for child, _ in children]
    return blocks


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is `y = W x + b` and can be replaced: Linear, or GPT-2's Conv1D.

    Subclasses that compute something else (routers, grouped projections) are not.
    """
    if type(module).__name__ in LIKE_LINEAR:
        return True
    return isinstance(module, (nn.Linear, Conv1D)) and type(module).forward in (
        nn.Linear.forward,
        Conv1D.forward,
    )


def _has_linear(module: nn.Module) -> bool:
    """Return whether there are linear layers inside, in an emulator and in few bits as well."""
    return any(
        is_linear(sub) or isinstance(sub, EmulatedLayer) or type(sub).__name__ in OF_BITSANDBYTES
        for sub in module.modules()
    )


def linears_within(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Names of the linear layers inside `blocks`, in module order, that have a weight of their own."""
    shared = shared_linears(model, blocks)
    return [name for name in _all_linears(model, blocks) if name not in shared]


def shared_linears(model: Any, blocks: Sequence[str]) -> dict[str, str]:
    """Linear layers inside `blocks` whose weight is that of another one too, with this as the reason.

    They are the same module under two names, or tied. Whatever is fitted to what one of them reads is not
    fitted to the others.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    shared = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    uses = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    return {
        name: "layers share its weight"
        for name in _all_linears(model, blocks)
        if name in shared or uses[id(model.get_submodule(name))] > 1
    }


def _all_linears(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if is_linear(module) and any(name.startswith(f"{block}.") for block in blocks)
    ]


def shared_input_groups(
    model: Any, layers: Sequence[str], *forwards: Callable[[Any], Any]
) -> list[list[str]]:
    """Group layers of one parent that a forward, `forward(model)`, calls with the very same tensors.

    A layer that runs several times reads one after another, and shares them all or none.

    Forwards run on a copy of fake tensors: nothing is computed, and transformers treats it as
    tracing, so no branch asks for values. Layers that none reaches (experts that no token chose), or
    that come after a step that cannot be traced, form groups of one.
    """
    inputs: dict[str, list[int]] = {}
    kept: list[Any] = []  # keeps inputs alive, so that no id is used twice

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            kept.append(given[0])
            inputs.setdefault(name, []).append(id(given[0]))

        return hook

    untraceable = (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError)
    quiet = logging.getLogger("torch._subclasses.fake_tensor")
    with (
        torch.no_grad(),
        FakeTensorMode(),
        contextlib.suppress(*untraceable),
        _disabled(quiet),
    ):
        with no_init_weights():
            # Grouped products of experts are traceable in bfloat16 alone.
            fake = type(model)._from_config(model.config, dtype=torch.bfloat16).eval()
        for name in layers:
            fake.get_submodule(name).register_forward_pre_hook(record(name))
        for forward in forwards:
            with contextlib.suppress(*untraceable):
                forward(fake)
    read = {name: tuple(tensors) for name, tensors in inputs.items()}
    shared: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, tensors in read.items():
        shared.setdefault((name.rpartition(".")[0], tensors), []).append(name)
    groups = [names for names in shared.values() if len(names) > 1]
    grouped = {name for names in groups for name in names}
    order = {name: index for index, name in enumerate(layers)}
    groups += [[name] for name in layers if name not in grouped]
    return sorted(groups, key=lambda group: order[group[0]])


@contextlib.contextmanager
def _disabled(logger: logging.Logger) -> Iterator[None]:
    """Silence torch's account of a failed trace, which costs no more than shared factors."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
