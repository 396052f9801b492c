"""Score a model, with or without an adapter, on examples with known answers."""

import json
from pathlib import Path
from typing import Any

from emloc.adapter import Adapter
from emloc.checkpoint import Checkpoint
from emloc.config import EvaluateConfig
from emloc.digest import data_digest, named_digests
from emloc.errors import ConfigError, OutputError
from emloc.family import ModelFamily
from emloc.manifest import Manifest
from emloc.output import write_json, writing
from emloc.plugin_options import own_options
from emloc.plugins import of_folder, open_model
from emloc.progress import console
from emloc.stage import stage

RESULT_NAME = "evaluation.json"


@stage(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; returns the scores, and writes them to `output_dir/evaluation.json` if given."""
    if config.dataset is None and not config.tasks:
        raise ConfigError("evaluate: dataset is required (or tasks, with the lm-eval extra).")
    model, family = open_model(config.model_name_or_path, config.single_file_config)
    _refuse_emulator_adapter(config, Manifest.find(model.path))
    settings = _settings(config, model, family)
    target = config.output_dir / RESULT_NAME if config.output_dir else None
    if target is not None and target.exists():
        known: dict[str, Any] = json.loads(target.read_text("utf-8"))
        if known.get("settings") == settings:
            console.print(f"evaluate: {target} is complete already")
            return known
        raise OutputError(
            f"{target} exists and is of another evaluation; choose another output_dir or remove it."
        )
    result = {**family.evaluate(of_folder(config, model)), "settings": settings}
    if target is not None:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, result)
    return result


def _settings(config: EvaluateConfig, model: Checkpoint, family: ModelFamily) -> dict[str, Any]:
    """The options, and the identity of what their paths hold now."""
    named = named_digests(config)
    return {
        **own_options(config, family, {"output_dir"}),
        "model_digest": model.digest(),
        "adapter_digest": Adapter.open(config.adapter).with_parts(model.parts).digest()
        if config.adapter
        else None,
        "companions_digest": model.companions_digest(),
        "data_digest": data_digest(config.dataset, config.dataset_split, config, family),
        **({"named_digests": named} if named else {}),
    }


def _refuse_emulator_adapter(config: EvaluateConfig, model: Manifest | None) -> None:
    """A LoRA that was trained for other weights would load without a word."""
    if config.adapter is None or not Path(config.adapter).is_dir():
        return
    # Scoring an uncorrected adapter on the original is a fair question, so only the reverse, a
    # corrected adapter on the emulator, is refused.
    origin = Manifest.find(Path(config.adapter))
    corrected = origin is not None and origin.kind == "corrected_adapter"
    if corrected and model is not None and model.kind == "emulator":
        raise ConfigError(
            f"evaluate: {config.adapter} is corrected for the original model; pass that instead of "
            f"the emulator {config.model_name_or_path}."
        )
