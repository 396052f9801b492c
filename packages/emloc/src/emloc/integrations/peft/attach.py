"""Put a PEFT adapter on a loaded model, and be sure that all of it is used.

PEFT, vLLM and others only warn when an adapter's keys do not match the model, and go on with what is
left of it, if anything.
"""

from typing import Any

import torch
from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from emloc.adapters.adapted_weights import adapted_weights, differs, is_copy, under_current_names
from emloc.adapters.rounding import RoundedBase, Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_config import exact_patterns
from emloc.artefacts.adapter_tensors import PREFIX
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.artefacts.read_errors import reading
from emloc.errors import MismatchError
from emloc.extend.family import ModelFamily


def attach(model: Any, adapter: str, checkpoint: Checkpoint, family: ModelFamily) -> Any:
    """The model with the adapter, in eval mode, and with dequantised weights if the adapter runs on those.

    Args:
        checkpoint: what the model was loaded from, in the family's layout.

    Raises:
        MismatchError: a tensor of the adapter has no place in the model, or is of another shape.
    """
    opened = Adapter.open(adapter)
    if "quantization_config" in checkpoint.config:
        lora = under_current_names(opened, family, model)
        _require_places(lora, model, checkpoint.name)
    else:
        skeleton = family.skeleton(checkpoint, torch.float32)
        rounding = Rounding.runs_on(Manifest.find(opened.path))
        if rounding is not None:
            _dequantise(model, RoundedBase.of(rounding, family, skeleton, checkpoint))
        lora = adapted_weights(opened, family, skeleton, checkpoint).adapter
    modules = dict(model.named_modules())
    for layer in lora.layers:
        if layer.name not in modules:
            raise MismatchError(
                f"Adapter {adapter}: {checkpoint.name} has no layer {layer.name}; it was trained for "
                f"another model."
            )
    return put_on(model, lora).eval()


def put_on(model: Any, lora: Adapter, trained: bool = False) -> Any:
    """The model with an adapter whose modules it has, under the names of now.

    Args:
        trained: whether the adapter's tensors are trained further.

    Raises:
        MismatchError: PEFT uses not all of its tensors.
    """
    adapted = _loaded(model, lora, trained)
    _require_loaded(adapted, lora)
    return adapted


def _dequantise(model: Any, frozen: RoundedBase) -> None:
    """Give the layers that were in few bits their weights as they were then."""
    for layer in frozen.layers:
        weight = model.get_submodule(layer).weight
        weight.data.copy_(frozen.parameter(layer))


def _loaded(model: Any, lora: Adapter, trained: bool) -> Any:
    """The model with the adapter's tensors, on the modules that the file has them for.

    PEFT renames what older versions called otherwise, but not for all models, and neither what was trained
    whole nor targets. So it is given the names that the modules have now, one by one.
    """
    with reading(lora.path, "has no configuration that PEFT can read", "write it again with PEFT"):
        config: Any = PeftConfig.from_pretrained(str(lora.path))
    config.target_modules = {layer.name for layer in lora.layers}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern, config.alpha_pattern = exact_patterns(
        lora.config, ((layer.name, layer.rank, layer.scaling) for layer in lora.layers)
    )
    config.inference_mode = not trained
    config.base_model_name_or_path = None  # what it was trained on is no news here
    config.init_lora_weights = True  # other beginnings look at data or weights, and are overwritten
    adapted = get_peft_model(model, config)
    named: dict[str, str] = {}
    for layer in lora.layers:
        for key in (layer.down_key, *layer.changed_keys):
            named[f"{PREFIX}{layer.name}.{key[key.rindex('.lora_') + 1 :]}"] = key
    named |= {f"{PREFIX}{name}": key for name, key in lora.saved.items()}
    _require_shapes(adapted, lora)
    set_peft_model_state_dict(adapted, {name: lora.read(key) for name, key in named.items()})
    return adapted


def _require_shapes(adapted: Any, lora: Adapter) -> None:
    """Refuse tensors that are not as large as those of the modules that they are for."""
    held = adapted.get_base_model()
    for layer in lora.layers:
        module: Any = held.get_submodule(layer.name)
        [name] = module.lora_B
        held_sizes = [module.lora_B[name].weight.shape[0], module.lora_A[name].weight.shape[1]]
        up, down = (lora.tensors.tensors[key].shape for key in (layer.up_key, layer.down_key))
        if held_sizes != [up[0], down[1]]:
            raise MismatchError(
                f"Adapter {lora.path}: {layer.name} is {up[0]}x{down[1]}, but in the model it is "
                f"{held_sizes[0]}x{held_sizes[1]}; the adapter was trained for another base model."
            )
    for parameter, key in lora.saved.items():
        module, _, leaf = parameter.rpartition(".")
        shape, stored = (
            getattr(held.get_submodule(module), leaf).shape,
            lora.tensors.tensors[key].shape,
        )
        if list(shape) != list(stored):
            raise MismatchError(
                f"Adapter {lora.path}: {parameter} has the shape {list(stored)}, but in the model it has "
                f"{list(shape)}; the adapter was trained for another base model."
            )


def _require_loaded(adapted: Any, lora: Adapter) -> None:
    """Every tensor of the file is on the model."""
    wanted = {layer.name: layer for layer in lora.layers}
    held = adapted.get_base_model()
    for name, module in held.named_modules():
        layer = wanted.get(name) if isinstance(module, LoraLayer) else None
        if layer is not None:
            [adapter] = module.lora_B
            parts = (module.lora_A[adapter].weight, module.lora_B[adapter].weight)
            if all(map(_equal, parts, map(lora.read, (layer.down_key, layer.up_key)))):
                del wanted[name]
    unused = [layer.down_key for layer in wanted.values()]
    for parameter, key in lora.saved.items():
        module, _, leaf = parameter.rpartition(".")
        if not _equal(getattr(held.get_submodule(module), leaf), lora.read(key)):
            unused.append(key)
    if unused:
        raise MismatchError(
            f"PEFT uses {len(lora.tensors.tensors) - len(unused)} of the {len(lora.tensors.tensors)} "
            f"tensors of {lora.path} but not {unused[0]}; it is for another model."
        )


def _equal(held: Any, stored: Tensor) -> bool:
    return torch.equal(held.detach().cpu(), stored.to(held.dtype).reshape(held.shape))


def _require_places(lora: Adapter, model: Any, name: str) -> None:
    """Refuse a tensor beside the LoRA that has no place in a model whose checkpoint is not of plain
    weights.
    """
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for parameter, key in lora.saved.items():
        shape = lora.tensors.tensors[key].shape
        if parameter not in held or tuple(held[parameter].shape) != shape:
            raise MismatchError(
                f"Adapter {lora.path} trained {parameter} whole, but {name} has none of that shape; it was "
                f"trained for another model."
            )
    for parameter, key in lora.copies.items():
        if parameter not in held or not is_copy(lora, key, held[parameter].detach().cpu()):
            raise differs(lora, key, parameter, name)


def attach_part(part: Any, adapter: Adapter) -> None:
    """Put the adapter of a pipeline's other model on it, in place.

    Raises:
        MismatchError: a layer of the adapter has no place in the model, or is of another shape.
    """
    modules = dict(part.named_modules())
    for layer in adapter.layers:
        module = modules.get(layer.name)
        tensors = adapter.tensors.tensors
        shape = (tensors[layer.up_key].shape[0], tensors[layer.down_key].shape[1])
        if module is None or tuple(module.weight.shape) != shape:
            raise MismatchError(
                f"Adapter {adapter.path}: {type(part).__name__} has no layer {layer.name} of "
                f"{shape[0]}x{shape[1]}; it was trained for another model."
            )
    _require_places(adapter, part, type(part).__name__)
    put_on(part, adapter).eval()
