"""Put a PEFT adapter on a loaded model, and be sure that all of it is used.

PEFT, vLLM and others only warn when an adapter's keys do not match the model, and go on with what is
left of it, if anything.
"""

from typing import Any

import torch
from peft import PeftModel

from emloc.adapted_weights import base_weights
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
    lora = Adapter.open(adapter)
    if "quantization_config" not in checkpoint.config:
        skeleton = family.skeleton(checkpoint, torch.float32)
        base_weights(lora, lambda name: family.stored(skeleton, name, checkpoint), checkpoint)
    modules = dict(model.named_modules())
    for layer in lora.layers:
        if layer.name not in modules:
            raise MismatchError(
                f"Adapter {adapter}: {checkpoint.name} has no layer {layer.name}; it was trained for "
                f"another model."
            )
    return PeftModel.from_pretrained(model, adapter).eval()


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
    PeftModel.from_pretrained(part, str(adapter.path)).eval()
