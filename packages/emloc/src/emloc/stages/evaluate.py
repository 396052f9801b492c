"""Score a model, with or without an adapter, on examples with known answers.

An adapter that runs on dequantised weights is scored on those.
"""

from pathlib import Path
from typing import Any

from emloc.adapters.rounding import DEQUANTISED, Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.companions import say_other_template
from emloc.artefacts.digest import named_digests
from emloc.artefacts.kinds import ADAPTER, BASE, CORRECTED_ADAPTER, EVALUATION
from emloc.artefacts.manifest import Manifest
from emloc.artefacts.output_place import require_folder, require_outside_data
from emloc.config import EvaluateConfig
from emloc.errors import ConfigError
from emloc.extend.capabilities import evaluated
from emloc.extend.family import ModelFamily
from emloc.extend.opening import named_family, of_folder, open_model
from emloc.extend.plugin_options import of_family, own_options
from emloc.options.marks import InsteadOf, marked
from emloc.stages.data_digest import data_digests
from emloc.stages.frame import Figures
from emloc.stages.stage import stage

RESULT_NAME = "evaluation.json"

IN_DIGESTS = {"model_name_or_path", "single_file_config", "adapter", "dataset"}
"""Options that are recorded, and whose meaning is in a digest."""


def _can_evaluate(config: EvaluateConfig) -> None:
    fields, others = type(config).model_fields, marked(type(config), InsteadOf)
    if config.dataset is None and not any(getattr(config, name) for name in others):
        said = "".join(f" (or {name}: {fields[name].description})" for name in others)
        raise ConfigError(f"evaluate: dataset is required{said}.")
    if config.output_dir is not None:
        require_folder(config.output_dir)
        require_outside_data(config)


@stage(
    EvaluateConfig,
    check=_can_evaluate,
    consumes={"model_name_or_path": BASE, "adapter": (CORRECTED_ADAPTER, ADAPTER)},
    produces=EVALUATION,
    folder="evaluation",
)
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; returns the scores, and writes them to `output_dir/evaluation.json` if given."""
    origin = Manifest.find(Path(config.adapter)) if config.adapter else None
    model, family = open_model(
        config.model_name_or_path,
        config.single_file_config,
        config.family,
        origin.family if origin else None,
    )
    config = of_family(config, family)
    _refuse_emulator_adapter(config, Manifest.find(model.path))
    if config.adapter is not None:
        say_other_template(Path(config.adapter), model.path)
    settings = _settings(config, model, family)
    target = config.output_dir / RESULT_NAME if config.output_dir else None
    figures = Figures("evaluate", target, settings, IN_DIGESTS)
    return figures.write(lambda: evaluated(family, of_folder(config, model)))


def _settings(config: EvaluateConfig, model: Checkpoint, family: ModelFamily) -> dict[str, Any]:
    """The options, and the identity of what their paths hold now."""
    named = named_digests(config)
    rounding = Rounding.runs_on(Manifest.find(Path(config.adapter)) if config.adapter else None)
    return {
        **own_options(config, {"output_dir"}),
        **named_family(model, family),
        "model_digest": model.digest(),
        "adapter_digest": Adapter.open(config.adapter).with_parts(model.parts).digest()
        if config.adapter
        else None,
        "companions_digest": model.companions_digest(),
        **data_digests(config, family),
        **({"named_digests": named} if named else {}),
        **({} if rounding is None else {DEQUANTISED: rounding.as_json()}),
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
