"""The adapter that a training goes on from, in place of a new LoRA."""

from typing import Any

import torch

from emloc.adapters.adapted_weights import adapted_weights, under_current_names
from emloc.adapters.rounding import Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.adapter_base import refuse_other_revision
from emloc.artefacts.adapter_config import exact_patterns
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.intact import require_read
from emloc.artefacts.manifest import Manifest
from emloc.config import LoraOptions, TrainConfig, TrainingOptions
from emloc.errors import ConfigError, MismatchError
from emloc.extend.family import ModelFamily
from emloc.options.marks import OfNewLora, marked

OPTIONS = frozenset(LoraOptions.model_fields) - {"loraplus_lr_ratio"}
"""Options of a new LoRA, which an adapter that is there already has answered; rates are of the training."""


def goes_on_from(
    config: TrainConfig, family: ModelFamily, checkpoint: Checkpoint
) -> Adapter | None:
    """The adapter that the options name, under the names that the model's modules have now; or None.

    Args:
        checkpoint: the model that is trained on, in the family's layout.

    Raises:
        CheckpointError: there is no such adapter, or it is not what was written.
        MismatchError: it has no place in the model, or is of other shapes.
    """
    if config.adapter is None:
        return None
    adapter = Adapter.open(config.adapter).with_parts(checkpoint.parts)
    origin = require_read(adapter.path, fresh=True)
    refuse_other_revision(adapter, origin, checkpoint.name)
    if Rounding.runs_on(origin) is not None:
        raise MismatchError(
            f"Adapter {adapter.path} runs on dequantised weights, but training continues beside those of "
            f"{checkpoint.name}; first correct it without that choice (limit_candidates)."
        )
    skeleton = family.skeleton(checkpoint, torch.float32)
    manifest = Manifest.find(checkpoint.path)
    if manifest is not None and manifest.kind == "emulator":
        return under_current_names(adapter, family, skeleton)  # its weights are in other forms
    return adapted_weights(adapter, family, skeleton, checkpoint).adapter


def refuse_options_of_a_new_lora(config: TrainingOptions, stage: str) -> None:
    """Refuse what would be ignored beside an adapter that is gone on from.

    Raises:
        ConfigError: an option of core's or of a family's that shapes a new LoRA is given.
    """
    of_new = OPTIONS | marked(type(config), OfNewLora).keys()
    taken = sorted(of_new & config.model_fields_set)
    if taken:
        raise ConfigError(
            f"{stage}: adapter={getattr(config, 'adapter', None)} is continued as it is, but {taken[0]} "
            f"is for a new LoRA; leave one of them out."
        )


def lora_options(adapter: Adapter) -> dict[str, Any]:
    """The options of train that a new LoRA of the same shape would have, but for how it begins."""
    layers = [(layer.name, layer.rank, layer.scaling) for layer in adapter.layers]
    ranks, alphas = exact_patterns(adapter.config, layers)
    return {
        "lora_r": adapter.config["r"],
        "lora_alpha": adapter.config.get("lora_alpha", 8),
        "lora_dropout": adapter.config.get("lora_dropout") or 0.0,
        "lora_target_modules": [name for name, _, _ in layers],
        "lora_rank_pattern": ranks,
        "lora_alpha_pattern": alphas,
        "use_rslora": bool(adapter.config.get("use_rslora")),
        "use_dora": bool(adapter.config.get("use_dora")),
        "lora_modules_to_save": list(adapter.config.get("modules_to_save") or []),
    }
