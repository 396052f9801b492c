"""Score a model, with or without an adapter, on examples with known answers."""

import json
from pathlib import Path
from typing import Any

from emloc.checkpoint import Checkpoint
from emloc.config import EvaluateConfig
from emloc.errors import ConfigError, OutputError
from emloc.manifest import Manifest
from emloc.output import write_json, writing
from emloc.plugins import family_of
from emloc.stage import stage

RESULT_NAME = "evaluation.json"


@stage(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; returns the scores, and writes them to `output_dir/evaluation.json` if given."""
    if config.dataset is None and not config.tasks:
        raise ConfigError("evaluate: dataset is required (or tasks, with the lm-eval extra).")
    target = config.output_dir / RESULT_NAME if config.output_dir else None
    if target is not None and target.exists():
        known = json.loads(target.read_text("utf-8"))
        if known.get("settings") == _settings(config):
            return known
        raise OutputError(f"{target} exists; choose another output_dir or remove it.")
    model = Checkpoint.open(config.model_name_or_path)
    manifest = Manifest.find(model.path)
    _refuse_emulator_adapter(config, manifest)
    result = {**family_of(model).evaluate(config), "settings": _settings(config)}
    if target is not None:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_json(target, result)
    return result


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"output_dir"})


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
