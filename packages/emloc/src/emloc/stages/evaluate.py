"""Score a model, with or without an adapter, on examples with known answers.

An adapter that runs on dequantised weights is scored on those.
"""

from typing import Any

from emloc.adapters.belonging import require_belonging
from emloc.adapters.rounding import DEQUANTISED, Rounding
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.companions import say_other_template
from emloc.artefacts.digest import named_digests
from emloc.artefacts.intact import require_read
from emloc.artefacts.kinds import ADAPTER, BASE, CORRECTED_ADAPTER, EVALUATION
from emloc.artefacts.manifest import MANIFEST_NAME, Manifest
from emloc.artefacts.output_place import require_folder, require_outside_data
from emloc.config import EvaluateConfig
from emloc.errors import ConfigError, OutputError
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
        place = require_folder(config.output_dir)
        require_outside_data(config)
        if (place / MANIFEST_NAME).exists():
            raise OutputError(
                f"output_dir {config.output_dir} holds an artefact, whose {MANIFEST_NAME} would not list the "
                f"scores; choose another output_dir."
            )


@stage(
    EvaluateConfig,
    check=_can_evaluate,
    consumes={"model_name_or_path": BASE, "adapter": (CORRECTED_ADAPTER, ADAPTER)},
    produces=EVALUATION,
    folder="evaluation",
)
def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; returns the scores, and writes them to `output_dir/evaluation.json` if given.

    Raises:
        MismatchError: the adapter is not made for the model, and `allow_mismatch` is not set.
        CheckpointError: one of them is not what a stage of ours wrote.
    """
    adapter = Adapter.open(config.adapter) if config.adapter else None
    origin = require_read(adapter.path, fresh=True) if adapter else None
    model, family = open_model(
        config.model_name_or_path,
        config.single_file_config,
        config.family,
        origin.family if origin else None,
    )
    config = of_family(config, family)
    digest = model.digest()
    if adapter is not None:
        if not config.allow_mismatch:
            require_belonging(adapter, origin, model.name, digest, _kind(model))
        say_other_template(adapter.path, model.path)
    settings = _settings(config, model, family, digest, adapter, origin)
    target = config.output_dir / RESULT_NAME if config.output_dir else None
    figures = Figures("evaluate", target, settings, IN_DIGESTS)
    return figures.write(lambda: evaluated(family, of_folder(config, model)))


def _kind(model: Checkpoint) -> str | None:
    manifest = Manifest.find(model.path)
    return None if manifest is None else manifest.kind


def _settings(
    config: EvaluateConfig,
    model: Checkpoint,
    family: ModelFamily,
    digest: str,
    adapter: Adapter | None,
    origin: Manifest | None,
) -> dict[str, Any]:
    """The options, and the identity of what their paths hold now."""
    named, rounding = named_digests(config), Rounding.runs_on(origin)
    return {
        **own_options(config, {"output_dir"}),
        **named_family(model, family),
        "model_digest": digest,
        "adapter_digest": adapter.with_parts(model.parts).digest() if adapter else None,
        "companions_digest": model.companions_digest(),
        **data_digests(config, family),
        **({"named_digests": named} if named else {}),
        **({} if rounding is None else {DEQUANTISED: rounding.as_json()}),
    }
