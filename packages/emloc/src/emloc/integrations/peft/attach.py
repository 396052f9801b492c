"""Put a PEFT adapter on a loaded model, and be sure that all of it is used.

PEFT, vLLM and others only warn when an adapter's keys do not match the model, and go on with what is
left of it, if anything.
"""

from typing import Any

import torch
from peft import PeftModel

from emloc.adapted_weights import adapted_weights, differs, is_copy, under_current_names
from emloc.adapter import Adapter
from emloc.checkpoint import Checkpoint
from emloc.errors import MismatchError
from emloc.family import ModelFamily


def attach(model: Any, adapter: str, checkpoint: Checkpoint, family: ModelFamily) -> Any:
    """The model with the adapter, in eval mode.

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
        lora = adapted_weights(opened, family, skeleton, checkpoint).adapter
    modules = dict(model.named_modules())
    for layer in lora.layers:
        if layer.name not in modules:
            raise MismatchError(
                f"Adapter {adapter}: {checkpoint.name} has no layer {layer.name}; it was trained for "
                f"another model."
            )
    for older, newer in zip((*opened.saved, *opened.copies), (*lora.saved, *lora.copies)):
        if older != newer:  # PEFT renames LoRAs alone
            raise MismatchError(
                f"Adapter {adapter} holds {older}, which the model calls {newer} now, and PEFT does not "
                f"rename what was trained whole; merge the adapter, and evaluate the merged model."
            )
    return PeftModel.from_pretrained(model, adapter).eval()


def _require_places(lora: Adapter, model: Any, name: str) -> None:
    """What is in the file beside LoRA has a place in a model whose checkpoint is not of plain weights."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for parameter, key in lora.saved.items():
        shape = lora.tensors.tensors[key].shape
        if parameter not in held or tuple(held[parameter].shape) != shape:
            raise MismatchError(
                f"Adapter {lora.path} trained {parameter} whole, of which {name} has none of that shape; "
                f"it was trained for another model."
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
    PeftModel.from_pretrained(part, str(adapter.path)).eval()
