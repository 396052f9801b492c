"""The LoRA in a training's checkpoint, compared with the one that is to go on from it.

The Trainer loads what has a place, leaves out the rest with a warning, and knows nothing of scalings.
"""

from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraLayer

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_config import CONFIG_NAME
from emloc.artefacts.adapter_tensors import WEIGHTS_NAME
from emloc.errors import CheckpointError


def require_same_lora(checkpoint: Path, model: Any) -> None:
    """Refuse a checkpoint whose LoRA is on other layers, or of another rank or scaling.

    Where several models are trained together, the checkpoint holds no adapter, and is loaded strictly.

    Args:
        model: with its LoRA.

    Raises:
        CheckpointError: names the checkpoint, the layer and what differs.
    """
    if not all((checkpoint / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)):
        return
    held = {
        layer.name: (layer.rank, layer.scaling, layer.magnitude_key is not None)
        for layer in Adapter.open(str(checkpoint)).layers
    }
    wanted = dict(
        _lora_of(name, module)
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    )
    for name in sorted(held.keys() | wanted.keys()):
        ours, theirs = wanted.get(name), held.get(name)
        if theirs != ours:
            raise CheckpointError(
                f"{checkpoint} is of another LoRA: on {name} it has {_shown(theirs)}, and this training "
                f"{_shown(ours)}; pass the options that it was made with, or go on from its LoRA as a new "
                f"training (adapter)."
            )


def _lora_of(name: str, module: Any) -> tuple[str, tuple[int, float, bool]]:
    [adapter] = module.r
    return name, (
        module.r[adapter],
        module.scaling[adapter],
        adapter in module.lora_magnitude_vector,
    )


def _shown(lora: tuple[int, float, bool] | None) -> str:
    if lora is None:
        return "none"
    rank, scaling, has_magnitude = lora
    return f"rank {rank}, scaling {scaling:g}{' and magnitudes (DoRA)' if has_magnitude else ''}"
