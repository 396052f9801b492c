"""The mean loss of a model, with or without an adapter: how a family without other scores is judged."""

from collections.abc import Sequence
from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.config import CalibrationOptions, EvaluateConfig
from emloc.errors import DependencyError, PluginError
from emloc.extend.capabilities import native_of
from emloc.extend.family import Batch, ModelFamily
from emloc.extend.losses import LossSum, scores_of, summed
from emloc.extend.plugin_options import with_family_options
from emloc.machine.memory import PeakMemory
from emloc.machine.progress import progress_bar

ALL = 2**31
"""A number of samples that no data set has."""


def evaluate_drawn(config: EvaluateConfig, family: ModelFamily) -> dict[str, Any]:
    """The loss of a model on samples that its family draws by seed, as for a calibration.

    So many as `num_samples` says; by default all. The arguments and results are those of `Evaluates`.

    Raises:
        DataError, CheckpointError, MismatchError: see their messages.
    """
    checkpoint = native_of(family, Checkpoint.open(locate(config.model_name_or_path)))
    kind = with_family_options(CalibrationOptions, family)
    given: dict[str, Any] = {
        name: getattr(config, name) for name in kind.model_fields.keys() & config.model_fields_set
    }
    given["calibration_batch_size"] = config.per_device_eval_batch_size
    given["num_calibration_samples"] = ALL if config.num_samples is None else config.num_samples
    return evaluate_loss(
        config, family, checkpoint, family.calibration_batches(checkpoint, kind(**given))
    )


def evaluate_loss(
    config: EvaluateConfig, family: ModelFamily, checkpoint: Checkpoint, batches: Sequence[Batch]
) -> dict[str, Any]:
    """The loss per term over micro-batches with labels, and what else the family scores.

    Args:
        checkpoint: the model in the family's layout.

    Returns:
        `loss`, further scores (`ScoresBatches`), `exact_match` (None), `samples` and `peak_bytes`.

    Raises:
        DataError, CheckpointError, MismatchError, DependencyError, PluginError: see their messages.
    """
    with PeakMemory(config.device, mapped=True) as peak:
        model: Any = family.load(checkpoint, config.dtype, config.device).eval()
        if config.adapter:
            model = _attached(model, config.adapter, checkpoint, family)
        parts: dict[str, list[LossSum]] = {}
        with torch.inference_mode(), progress_bar("loss", len(batches)) as advance:
            for batch in batches:
                here = {name: tensor.to(config.device) for name, tensor in batch.items()}
                for name, score in scores_of(family, model, here).items():
                    parts.setdefault(name, []).append(score)
                advance()
        samples = sum(len(next(iter(batch.values()))) for batch in batches)
        what = f"Data set {config.dataset}"
        means = {name: summed(each).mean(what) for name, each in parts.items()}
    figures = {"exact_match": None, "samples": samples, **peak.figures()}
    if "loss" not in means or not means.keys().isdisjoint(figures):
        raise PluginError(
            f"The family {family.name} scores {', '.join(sorted(means))}; there must be a loss, but none of "
            f"{', '.join(figures)}, which mean something else. Report it to the plugin's author."
        )
    return {**means, **figures}


def _attached(model: Any, adapter: str, checkpoint: Checkpoint, family: ModelFamily) -> Any:
    """The model with the adapter; without one, PEFT is not needed."""
    try:
        from emloc.integrations.peft.attach import attach
    except ImportError as problem:
        raise DependencyError(
            "evaluate: loading an adapter needs peft, which is not installed; pip install peft."
        ) from problem
    return attach(model, adapter, checkpoint, family)
