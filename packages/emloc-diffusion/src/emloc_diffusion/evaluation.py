"""The scores of a denoiser, with or without a LoRA: its loss, its pictures' scores, a contact sheet.

The loss is on pictures under noise that training did not see. Pictures are drawn, by the stock pipeline,
only where the options ask for scores (`emloc_diffusion.scoring`) or a sheet (`emloc_diffusion.picture_plan`).
"""

from typing import Any

import torch

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.locate import locate
from emloc.extend.family import ModelFamily
from emloc.extend.losses import LossSum, loss_sum, summed
from emloc.integrations.peft.attach import attach
from emloc.machine.memory import PeakMemory
from emloc.machine.progress import progress_bar
from emloc_diffusion.encode.components import release
from emloc_diffusion.evaluated_pictures import check_encoders, draw_and_score
from emloc_diffusion.objective import objective_of
from emloc_diffusion.picture_plan import plan_pictures
from emloc_diffusion.samples import Samples, encode_samples

HELD_OUT_SEED = 0x5EED
"""The seed of noise and timesteps; training's depend on its own seed and never begin here."""


def evaluate_model(config: Any, family: ModelFamily) -> dict[str, Any]:
    """Scores of a denoiser with or without an adapter.

    Returns:
        `loss` (mean squared error over latents' elements), `exact_match` (None), `samples` and
        `peak_bytes`; where asked for, `dino`, `clip_i`, `clip_t` with `generated_pictures` and
        `real_pictures`, and `contact_sheet`.

    Raises:
        ConfigError, DataError, CheckpointError, MismatchError, DependencyError: see their messages.
    """
    with PeakMemory(config.device, mapped=True) as peak:
        scores = _evaluate(config, family)
    return {**scores, **peak.figures()}


def _evaluate(config: Any, family: ModelFamily) -> dict[str, Any]:
    checkpoint = Checkpoint.open(locate(config.model_name_or_path))
    plan = plan_pictures(config, checkpoint)
    if plan is not None:
        check_encoders(config)
    samples = encode_samples(checkpoint.path, config, config.device, adapter=config.adapter)
    model: Any = family.load(checkpoint, config.dtype, config.device)
    if config.adapter:
        model = attach(model, config.adapter, checkpoint, family)
    dtype = next(model.parameters()).dtype
    scores = _loss(config, checkpoint, family, model, samples)
    if plan is None:
        return scores
    del model  # the pipeline brings its own
    release()
    chosen = samples.indices(prior=False)
    real = list(
        dict.fromkeys(samples.pictures[i].path for i in chosen)
    )  # mirrored ones are no others
    return scores | draw_and_score(plan, config, checkpoint, real, dtype)


def _loss(
    config: Any,
    checkpoint: Checkpoint,
    family: ModelFamily,
    model: Any,
    samples: Samples,
) -> dict[str, Any]:
    objective = objective_of(checkpoint.path)
    generator = torch.Generator().manual_seed(HELD_OUT_SEED)
    chosen = samples.indices(prior=False)[: config.num_samples]
    order = [chosen[i % len(chosen)] for i in range(max(config.num_noise_samples, len(chosen)))]
    parts: list[LossSum] = []
    size = config.per_device_eval_batch_size
    with torch.inference_mode(), progress_bar("loss", len(order)) as advance:
        for start in range(0, len(order), size):
            part = order[start : start + size]
            # One by one: what is drawn for a picture does not depend on how many are measured at once.
            drawn = [samples.batch([one], objective, generator) for one in part]
            batch = {
                name: torch.cat([each[name] for each in drawn]).to(config.device)
                for name in drawn[0]
            }
            parts.append(loss_sum(family, model, batch))
            advance(len(part))
    loss = summed(parts).mean(f"Pictures of {config.dataset}")
    return {"loss": loss, "exact_match": None, "samples": len(chosen)}
