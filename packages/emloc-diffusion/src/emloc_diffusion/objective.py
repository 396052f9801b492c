"""The objective of a denoiser: which noise at which timestep, and what it should predict.

Diffusion (SD, SDXL; DDPM, Ho et al. 2020): `x_t = √ᾱ_t x + √(1 − ᾱ_t) ε`, t uniform, target ε, or
`v = √ᾱ_t ε − √(1 − ᾱ_t) x`, or x, by the scheduler's `prediction_type`. Flow matching (SD3, FLUX; Esser et
al. 2024): `x_σ = (1 − σ) x + σ ε`, target ε − x; σ logit-normal, then shifted as the scheduler says, where
its shift does not depend on the picture's size. Calibration and training draw from the same objective.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from pydantic import Field
from torch import Tensor

from emloc.artefacts.json_files import read_json
from emloc.artefacts.read_errors import reading
from emloc.artefacts.schema import Schema, conforming
from emloc.errors import CheckpointError

DDPM_SCHEDULERS = {
    *(scheduler.name for scheduler in KarrasDiffusionSchedulers),
    "LCMScheduler", "TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler",
} - {"EDMEulerScheduler"}  # fmt: skip
"""Samplers of models that were trained with DDPM's noise: each one's configuration is also DDPM's."""


@dataclass(frozen=True)
class Noised:
    """`sample` and `target` (samples × channels × height × width), `timestep` (samples, 0 to 1000)."""

    sample: Tensor
    timestep: Tensor
    target: Tensor


class _Scheduler(Schema):
    """Entries that are looked at of a scheduler's configuration, of both kinds."""

    class_name: str = Field("DDPMScheduler", alias="_class_name")
    num_train_timesteps: Annotated[int, Field(ge=1, le=100_000)] = 1000
    shift: Annotated[float, Field(gt=0, le=1000)] = 1.0
    use_dynamic_shifting: bool | None = False
    prediction_type: str = "epsilon"


class Diffusion:
    """Noise of the pipeline's own schedule, timesteps uniform."""

    def __init__(self, config: dict[str, Any], where: Path) -> None:
        name = config.get("_class_name", "DDPMScheduler")
        if name not in DDPM_SCHEDULERS or config.get("timestep_type") == "continuous":
            raise CheckpointError(
                f"The pipeline's scheduler is a {name}, whose noise is neither DDPM's nor flow matching's; "
                f"use a Stable Diffusion or FLUX.1 pipeline."
            )
        if config.get("use_flow_sigmas"):
            raise CheckpointError(
                f"The pipeline's scheduler is a {name} with use_flow_sigmas; give it the model's own "
                f"FlowMatchEulerDiscreteScheduler."
            )
        known = {key: value for key, value in config.items() if not key.startswith("_")}
        with reading(
            where, "does not describe a DDPMScheduler of diffusers", "use the model's own"
        ):
            self._scheduler: Any = DDPMScheduler.from_config(known)
        alphas: Tensor = self._scheduler.alphas_cumprod
        inside = bool(((alphas >= 0) & (alphas <= 1)).all())
        if tuple(alphas.shape) != (self._scheduler.config.num_train_timesteps,) or not inside:
            raise CheckpointError(
                f"{where} describes noise whose share of the picture is outside the range from 0 to 1; use "
                f"the model's own."
            )
        self._kind = str(known.get("prediction_type", "epsilon"))
        if self._kind not in ("epsilon", "v_prediction", "sample"):
            raise CheckpointError(
                f"The pipeline's scheduler has prediction_type {self._kind}; expected epsilon, "
                f"v_prediction or sample."
            )

    def draw(self, latents: Tensor, generator: torch.Generator) -> Noised:
        """One timestep and one noise per sample."""
        count = len(latents)
        steps = int(self._scheduler.config.num_train_timesteps)
        timestep = torch.randint(steps, (count,), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = self._scheduler.add_noise(latents, noise, timestep)
        if self._kind == "epsilon":
            target = noise
        elif self._kind == "sample":
            target = latents
        else:
            target = self._scheduler.get_velocity(latents, noise, timestep)
        return Noised(noisy, timestep.float(), target)


class FlowMatching:
    """A straight line from the picture to noise."""

    def __init__(self, config: _Scheduler) -> None:
        self._shift = 1.0 if config.use_dynamic_shifting else config.shift
        self._steps = config.num_train_timesteps

    def draw(self, latents: Tensor, generator: torch.Generator) -> Noised:
        """One σ and one noise per sample."""
        noise = torch.randn(latents.shape, generator=generator)
        u = torch.sigmoid(torch.randn(len(latents), generator=generator))
        sigma = self._shift * u / (1 + (self._shift - 1) * u)
        wide = sigma.view(-1, 1, 1, 1)
        return Noised((1 - wide) * latents + wide * noise, sigma * self._steps, noise - latents)


Objective: TypeAlias = Diffusion | FlowMatching


def objective_of(pipeline: Path) -> Objective:
    """Find the objective by the pipeline's scheduler.

    Raises:
        CheckpointError: it has none, or one that trains otherwise.
    """
    path = pipeline / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    described = conforming(_Scheduler, config, path)
    if described.class_name.startswith("FlowMatch"):
        return FlowMatching(described)
    return Diffusion(config, path)
