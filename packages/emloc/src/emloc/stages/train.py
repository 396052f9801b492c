"""Stage 2: train a LoRA on the emulator, with the training library of the model's family.

Training happens in `<output_dir>.partial`, which keeps the resumable checkpoints, and becomes
`output_dir` with the adapter at its top.
"""

import time
from pathlib import Path
from typing import Any

from emloc.adapter import WEIGHTS_NAME
from emloc.checkpoint import Checkpoint
from emloc.config import TrainConfig
from emloc.digest import dataset_sha256
from emloc.errors import ConfigError
from emloc.manifest import Manifest, ModelReference, same_settings, versions
from emloc.output import file_sha256, stage_folder, writing
from emloc.plugins import family_named, family_of
from emloc.progress import console
from emloc.stage import stage


@stage(TrainConfig)
def train(config: TrainConfig) -> Path:
    """Train a LoRA; returns the folder of the PEFT adapter."""
    if (config.emulator is None) == (config.model_name_or_path is None):
        raise ConfigError("train: pass either emulator, or model_name_or_path to train on a model.")
    if config.dataset is None:
        raise ConfigError("train: dataset is required (a JSONL, CSV or parquet file, or a hub id).")
    model = Checkpoint.open(config.emulator or str(config.model_name_or_path))
    emulator = Manifest.read(model.path) if config.emulator else None
    if emulator is not None and emulator.kind != "emulator":
        raise ConfigError(f"train: {config.emulator} is not an emulator but a {emulator.kind}.")
    family = family_named(emulator.family) if emulator else family_of(model)
    digest = model.digest()
    settings: dict[str, Any] = {
        **config.model_dump(
            mode="json",
            exclude={"output_dir", "emulator", "model_name_or_path", "resume_from_checkpoint"},
        ),
        "model_digest": digest,
        "dataset_sha256": dataset_sha256(config.dataset),
        "eval_dataset_sha256": dataset_sha256(config.eval_dataset),
    }
    if same_settings(Manifest.find(config.output_dir), settings):
        console.print(f"train: {config.output_dir} is complete already")
        return config.output_dir
    started = time.monotonic()
    reference = ModelReference(name_or_path=model.reference_name(), digest=digest)
    with stage_folder(config.output_dir, settings) as work:
        with writing(work):
            figures = family.train(config, work)
        Manifest(
            kind="adapter",
            family=family.name,
            base_model=emulator.base_model if emulator else reference,
            emulator=reference if emulator else None,
            settings=settings,
            summary=figures.pop("summary", {}),
            files={WEIGHTS_NAME: file_sha256(work / WEIGHTS_NAME)},
            versions=versions("emloc", "torch", "transformers", "peft", "trl", "accelerate"),
            measured={
                "seconds": round(time.monotonic() - started, 3),
                **figures,
            },
        ).write(work)
    return config.output_dir
