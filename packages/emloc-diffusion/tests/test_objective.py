"""Noise and targets are what diffusers' own schedulers make of a pipeline's configuration."""

import json

import diffusers
import pytest
import torch

import emloc
from emloc.errors import CheckpointError, ConfigError
from emloc_diffusion.objective import objective_of

STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def objective(folder, name, **config):
    (folder / "scheduler").mkdir(exist_ok=True)
    content = {"_class_name": name, **config}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(content))
    return objective_of(folder)


def drawn(objective, seed=0):
    latents = torch.randn(64, 4, 3, 5, generator=torch.Generator().manual_seed(9))
    return latents, objective.draw(latents, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [
    "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DDIMScheduler", "LCMScheduler", "UniPCMultistepScheduler",
])  # fmt: skip
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_noise_is_that_of_the_pipelines_schedule(tmp_path, name, kind):
    config = {**STABLE, "prediction_type": kind, "num_train_timesteps": 800}
    latents, found = drawn(objective(tmp_path, name, **config))
    scheduler = getattr(diffusers, name).from_config(config)
    steps = found.timestep.long()
    assert int(steps.max()) < 800
    share = scheduler.alphas_cumprod[steps].view(-1, 1, 1, 1)
    noise = (found.sample - share.sqrt() * latents) / (1 - share).sqrt()
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    target = noise if kind == "epsilon" else share.sqrt() * noise - (1 - share).sqrt() * latents
    torch.testing.assert_close(found.target, target, atol=2e-3, rtol=2e-3)


def test_a_schedule_that_ends_in_noise_alone(tmp_path):
    config = {**STABLE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    made = objective(tmp_path, "EulerDiscreteScheduler", **config)
    torch.testing.assert_close(made._scheduler.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_shifted_as_the_scheduler_is(tmp_path, shift):
    config = {"shift": shift, "num_train_timesteps": 500}
    latents, found = drawn(objective(tmp_path, "FlowMatchEulerDiscreteScheduler", **config))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    sigma = (found.timestep / 500).view(-1, 1, 1, 1)
    torch.testing.assert_close(found.sample, latents + sigma * found.target, atol=1e-5, rtol=1e-5)
    # In logits, a shift by s adds log s to what is drawn around 0.
    middle = torch.logit(found.timestep / 500).median().exp()
    assert middle.item() == pytest.approx(shift, rel=0.5)
    half = (scheduler.sigmas - shift / (1 + shift)).abs().min()  # of 0.5, shifted
    assert half.item() < 2e-3


@pytest.mark.parametrize(("name", "config"), [
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("DDPMWuerstchenScheduler", {}),
    ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
])  # fmt: skip
def test_other_noise_is_refused(tmp_path, name, config):
    with pytest.raises(CheckpointError, match="scheduler"):
        objective(tmp_path, name, **config)


@pytest.mark.parametrize("option", [{"max_length": 64}, {"dataset_split": "test"},
                                    {"column_map": {"a": "text"}},
                                    {"num_calibration_tokens": 9}])  # fmt: skip
def test_options_that_mean_nothing_for_pictures_are_refused(tiny, tmp_path, option):
    [name] = option
    common = {"instance_data_dir": str(tiny.pictures), "instance_prompt": "a sks square", **option}
    expected = f"{name} is an option of the family llm and vlm, but the model is of diffusion"
    with pytest.raises(ConfigError, match=expected):
        emloc.compress(model_name_or_path=str(tiny.base), output_dir=tmp_path / "e", **common)
    if name != "num_calibration_tokens":
        with pytest.raises(ConfigError, match=expected):
            emloc.train(model_name_or_path=str(tiny.base), output_dir=tmp_path / "a", **common)
        with pytest.raises(ConfigError, match=expected):
            emloc.evaluate(model_name_or_path=str(tiny.base), **common)


def test_options_of_text_are_refused_as_those_of_other_families(tiny, tmp_path):
    common = {"instance_data_dir": str(tiny.pictures), "instance_prompt": "a sks square"}
    expected = "packing is an option of the family llm and vlm, but the model is of diffusion"
    with pytest.raises(ConfigError, match=expected):
        emloc.train(
            model_name_or_path=str(tiny.base), output_dir=tmp_path / "a", packing=True, **common
        )


def test_a_weight_of_pictures_that_are_not_there_is_refused(tiny, tmp_path):
    with pytest.raises(ConfigError, match="prior_loss_weight is set without class_data_dir"):
        emloc.train(model_name_or_path=str(tiny.base), output_dir=tmp_path / "a", prior_loss_weight=2.0,
                    instance_data_dir=str(tiny.pictures), instance_prompt="a sks square")  # fmt: skip
