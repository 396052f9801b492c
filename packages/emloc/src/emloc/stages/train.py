"""Stage 2: train a LoRA on the emulator, with the training library of the model's family.

Training happens in `<output_dir>.partial`, which keeps the resumable checkpoints, and becomes
`output_dir` with the adapter at its top.
"""

import time
from pathlib import Path
from typing import Any

from emloc.adapter import Adapter
from emloc.config import TrainConfig
from emloc.digest import data_digest, named_digests
from emloc.errors import ConfigError, NumericalError
from emloc.manifest import Manifest, ModelReference, same_settings, versions
from emloc.output import file_sha256, others_writing, stage_folder
from emloc.planning.contract import keeping, train_contract
from emloc.plugin_options import own_options
from emloc.plugins import of_folder, open_model
from emloc.progress import console
from emloc.stage import stage

PATHS = {
    "output_dir",
    "emulator",
    "model_name_or_path",
    "single_file_config",
    "dataset",
    "eval_dataset",
}
"""Options whose meaning is in a digest instead."""

WITHOUT_EFFECT = {
    "resume_from_checkpoint",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
}
"""Options that leave the adapter as it is: an interrupted run may go on with others."""


@stage(TrainConfig)
def train(config: TrainConfig) -> Path:
    """Train a LoRA; returns the folder of the PEFT adapter."""
    if (config.emulator is None) == (config.model_name_or_path is None):
        raise ConfigError("train: pass either emulator, or model_name_or_path to train on a model.")
    if config.dataset is None:
        raise ConfigError(
            "train: dataset is required (a JSONL, CSV or parquet file, a folder, or a hub id)."
        )
    model, family = open_model(
        config.emulator or str(config.model_name_or_path), config.single_file_config
    )
    emulator = Manifest.read(model.path) if config.emulator else None
    if emulator is not None and emulator.kind != "emulator":
        raise ConfigError(f"train: {config.emulator} is not an emulator but a {emulator.kind}.")
    digest, named = model.digest(), named_digests(config)
    settings: dict[str, Any] = {
        **own_options(config, family, PATHS | WITHOUT_EFFECT),
        "model_digest": digest,
        "companions_digest": model.companions_digest(),
        "data_digest": data_digest(config.dataset, config.dataset_split, config, family),
        "eval_data_digest": data_digest(
            config.eval_dataset, config.eval_dataset_split, config, family
        ),
        **({"named_digests": named} if named else {}),
    }
    if same_settings(Manifest.find(config.output_dir), settings):
        console.print(f"train: {config.output_dir} is complete already")
        return config.output_dir
    contract = None if config.memory is None else train_contract(config, model, family)
    started = time.monotonic()
    reference = ModelReference.of(model, digest)
    with keeping(contract), stage_folder(config.output_dir, settings) as work:
        with others_writing(work):
            figures = family.train(of_folder(config, model), work)
        adapter = Adapter.open(str(work)).with_parts(model.parts)
        adapter.require_finite(_diverged)
        adapter.name_base(reference.name_or_path)
        exported = family.export_adapter(model, work)
        summary = figures.pop("summary", {})
        if contract is not None:
            contract.report(figures)
        Manifest(
            kind="adapter",
            family=family.name,
            base_model=emulator.base_model if emulator else reference,
            emulator=reference if emulator else None,
            settings=settings,
            summary=summary,
            files={name: file_sha256(work / name) for name in (*adapter.files, *exported)},
            versions=versions("emloc", "torch", "transformers", "peft", "trl", "accelerate"),
            method=emulator.method if emulator else None,
            measured={
                "seconds": round(time.monotonic() - started, 3),
                **figures,
            },
        ).write(work)
    return config.output_dir


def _diverged(key: str) -> NumericalError:
    return NumericalError(
        f"Training gave NaN or infinity in {key}; use a lower learning_rate or max_grad_norm."
    )
