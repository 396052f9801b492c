"""Stage 2: train a LoRA on the emulator, with the training library of the model's family.

Training happens in `<output_dir>.partial`, which keeps the resumable checkpoints, and becomes
`output_dir` with the adapter at its top.
"""

from pathlib import Path
from typing import Any

import torch

from emloc.adapters.going_on import (
    OPTIONS,
    goes_on_from,
    lora_options,
    refuse_options_of_a_new_lora,
)
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.digest import named_digests
from emloc.artefacts.kinds import ADAPTER, EMULATOR
from emloc.artefacts.manifest import Manifest, ModelReference
from emloc.artefacts.output_place import has_place
from emloc.artefacts.write_errors import others_writing
from emloc.config import TrainConfig
from emloc.errors import CheckpointError, ConfigError, NumericalError
from emloc.extend.capabilities import ContinuesAdapters, StreamsTraining, exported
from emloc.extend.family import ModelFamily
from emloc.extend.opening import named_family, of_folder, open_model
from emloc.extend.plugin_options import of_family, own_options
from emloc.planning.setting import Setting
from emloc.planning.whole import trained_whole
from emloc.stages.data_digest import data_digests, digested
from emloc.stages.frame import Artefact, Written, digests
from emloc.stages.resumed import resumed_from
from emloc.stages.stage import stage
from emloc.stages.training_needs import (
    check_training,
    require_modules,
    require_trained,
    say_idle_options,
)

PATHS = {
    "output_dir",
    "emulator",
    "model_name_or_path",
    "single_file_config",
    "adapter",
}
"""Options whose meaning is in a digest instead."""


def _can_train(config: TrainConfig) -> None:
    if (config.emulator is None) == (config.model_name_or_path is None):
        raise ConfigError("train: pass either emulator, or model_name_or_path to train on a model.")
    if config.dataset is None:
        raise ConfigError(
            "train: dataset is required (a JSONL, CSV or parquet file, a folder, or a hub id)."
        )
    if config.adapter:
        refuse_options_of_a_new_lora(config, "train")
    if config.max_steps == 0:
        raise ConfigError(
            "train: max_steps = 0 would learn nothing; leave it out to train for num_train_epochs."
        )
    has_place(config)
    check_training(config)


def _has_modules(config: TrainConfig, model: Checkpoint, family: ModelFamily) -> None:
    skeleton = family.skeleton(model, torch.float32)
    require_modules(config, [name for name, _ in skeleton.named_modules()])
    manifest = Manifest.find(model.path)
    recorded = manifest.summary.get("drawn", []) if manifest else []
    drawn = [*model.drawn, *map(str, recorded)]
    if config.adapter is None:  # what is gone on from has its own
        require_trained(config, trained_whole(family, config), model, drawn)


@stage(
    TrainConfig,
    check=_can_train,
    suits=_has_modules,
    consumes={"emulator": EMULATOR},
    produces=ADAPTER,
    folder="adapter",
    memory=Setting.train,
    instead={"model_name_or_path": "emulator"},
)
def train(config: TrainConfig) -> Path:
    """Train a LoRA; returns the folder of the PEFT adapter."""
    model, family = open_model(
        config.emulator or str(config.model_name_or_path),
        config.single_file_config,
        config.family,
    )
    config = of_family(config, family)
    train.require_suited(config, model, family)
    say_idle_options(config)
    emulator = _emulator(config, Manifest.find(model.path))
    if config.stream and not isinstance(family, StreamsTraining):
        raise ConfigError(
            f"train: the family {family.name} loads its model whole to train; leave stream out."
        )
    begun = _begun(config, model, family)
    digest, named = model.digest(), named_digests(config)
    settings: dict[str, Any] = {
        **own_options(config, PATHS.union(digested(config), OPTIONS if begun else ())),
        **({"adapter_digest": begun.digest()} if begun else {}),
        **named_family(model, family),
        "model_digest": digest,
        "companions_digest": model.companions_digest(),
        **data_digests(config, family),
        **({"named_digests": named} if named else {}),
    }
    settings |= resumed_from(config, config.output_dir, settings)
    if begun is not None:
        config = config.model_copy(update=lora_options(begun))
        check_training(config)
    reference = ModelReference.of(model, digest)
    artefact = Artefact(
        "train",
        ADAPTER,
        config.output_dir,
        settings,
        family.name,
        emulator.base_model if emulator else reference,
        emulator=reference if emulator else None,
        adapter=ModelReference.of_adapter(begun.path, begun.digest()) if begun else None,
        method=emulator.method if emulator else None,
        packages=("torch", "transformers", "peft", "trl", "accelerate"),
        streamed=False,
    )

    def write(work: Path) -> Written:
        with others_writing(work):
            figures = family.train(of_folder(config, model), work)
        adapter = Adapter.open(str(work)).with_parts(model.parts)
        adapter.require_finite(_diverged)
        adapter.name_base(reference.name_or_path)
        others = exported(family, model, work)
        how = {
            "device": config.device,
            "gradient_checkpointing": config.gradient_checkpointing,
        }
        return Written(
            digests(work, (*adapter.files, *others)),
            summary=figures.pop("summary", {}),
            measured={**how, **figures},
        )

    return artefact.write(write, lambda: train.contract(config, model, family, begun))


def _begun(config: TrainConfig, model: Checkpoint, family: ModelFamily) -> Adapter | None:
    """The adapter that training goes on from, where one is named."""
    asked = [name for name in ("adapter", "num_held_back_samples") if getattr(config, name)]
    if asked and not isinstance(family, ContinuesAdapters):
        raise ConfigError(
            f"train: the family {family.name} starts with a new LoRA and trains on all samples; leave "
            f"{asked[0]} out."
        )
    return goes_on_from(config, family, model)


def _emulator(config: TrainConfig, manifest: Manifest | None) -> Manifest | None:
    """The emulator's manifest; None for a LoRA on a model itself."""
    is_emulator = manifest is not None and manifest.kind == "emulator"
    if config.emulator is None and is_emulator:
        raise ConfigError(
            f"train: {config.model_name_or_path} is an emulator; pass it as emulator, so that the LoRA "
            f"can be corrected for the original."
        )
    if config.emulator is not None and not is_emulator:
        raise CheckpointError(
            f"{config.emulator} is not an emulator: it was not written by emloc compress; make one, or pass "
            f"it as model_name_or_path to train on it."
        )
    return manifest if config.emulator else None


def _diverged(key: str) -> NumericalError:
    return NumericalError(
        f"Training gave NaN or infinity in {key}; use a lower learning_rate or max_grad_norm."
    )
