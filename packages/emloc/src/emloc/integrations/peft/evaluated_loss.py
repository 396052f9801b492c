"""The mean loss of a model, with or without an adapter: how a family without other scores is judged."""

from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.config import CompressConfig, EvaluateConfig
from emloc.extend.capabilities import native_of
from emloc.extend.family import ModelFamily
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.extend.plugin_options import of_family, with_plugin_options
from emloc.integrations.peft.attach import attach
from emloc.machine.memory import PeakMemory
from emloc.machine.progress import progress_bar


def evaluate_loss(config: EvaluateConfig, family: ModelFamily) -> dict[str, Any]:
    """The loss per term, over all samples or over `num_samples` of them, drawn by seed.

    Returns:
        `loss`, `exact_match` (None), `samples` and `peak_bytes`.

    Raises:
        DataError, CheckpointError, MismatchError: see their messages.
    """
    with PeakMemory(config.device, mapped=True) as peak:
        scores = _evaluate(config, family)
    return {**scores, **peak.figures()}


def _evaluate(config: EvaluateConfig, family: ModelFamily) -> dict[str, Any]:
    checkpoint = native_of(family, Checkpoint.open(locate(config.model_name_or_path)))
    batches = family.calibration_batches(checkpoint, _all_samples(config, family))
    model: Any = family.load(checkpoint, config.dtype, config.device).eval()
    if config.adapter:
        model = attach(model, config.adapter, checkpoint, family)
    parts: list[LossSum] = []
    with torch.inference_mode(), progress_bar("loss", len(batches)) as advance:
        for batch in batches:
            here = {name: tensor.to(config.device) for name, tensor in batch.items()}
            parts.append(loss_sum(family, model, here))
            advance()
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    loss = summed(parts).mean(f"Data set {config.dataset}")
    return {"loss": loss, "exact_match": None, "samples": samples}


def _all_samples(config: EvaluateConfig, family: ModelFamily) -> CompressConfig:
    """The options of evaluating as those of drawing calibration samples."""
    kind: type[CompressConfig] = with_plugin_options(CompressConfig)
    shared = config.model_fields_set & kind.model_fields.keys()
    given: dict[str, Any] = {
        **{name: getattr(config, name) for name in shared},
        "output_dir": "unused",
        "num_calibration_samples": config.num_samples or 1 << 40,
        "calibration_batch_size": config.per_device_eval_batch_size,
    }
    return of_family(kind(**given), family)
