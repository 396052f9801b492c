"""The demo's base model: a small Stable Diffusion, trained from nothing on captioned easy-VQA.

As large ones are made: the autoencoder learns first, to carry pictures through small latents; then
text encoder and UNet learn to draw what a caption says. A few minutes on two cores, kept in the user's
cache under a digest of what shapes it.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from emloc.artefacts.cache import cache_folder
from emloc.artefacts.durable import sync_tree
from emloc.demos.easy_vqa import WHEEL_SHA256, easy_vqa, questions
from emloc.machine.progress import progress_bar
from emloc_diffusion.demo.captions import VOCABULARY, caption, described
from emloc_diffusion.demo.pictures import close_ups
from emloc_diffusion.demo.small_stable_diffusion import Shape, small_pipeline

Loss = Callable[[], Tensor]

UNSAID = 0.1
"""Share of samples with no caption at all, for guidance; as many name the shape alone."""

KL_WEIGHT = 1e-5
"""The weight of the term that holds latents near a unit Gaussian, beside an error per pixel."""

AVERAGING = 0.99
"""Share of the running average of weights that outlives a step."""


@dataclass(frozen=True)
class Recipe:
    """The settings by which the base is built and trained.

    Attributes:
        shape: widths and depths.
        cuts: of every picture.
        vae_steps: of the autoencoder.
        vae_batch: pictures in each of them.
        vae_rate: learning rate of the autoencoder, at its highest.
        steps: of text encoder and UNet.
        batch: latents in each of them.
        learning_rate: of text encoder and UNet, at its highest.
        seed: of initial weights and of what is drawn.
    """

    shape: Shape = field(default_factory=Shape)
    cuts: int = 2
    vae_steps: int = 700
    vae_batch: int = 16
    vae_rate: float = 2e-3
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


def trained_base(recipe: Recipe | None = None) -> Path:
    """The folder of a `StableDiffusionPipeline`, trained on first use.

    Raises:
        CheckpointError: easy-VQA cannot be had.
    """
    recipe = recipe or Recipe()
    identity = json.dumps({**asdict(recipe), "data": WHEEL_SHA256, "format": 2}, sort_keys=True)
    name = f"easy-vqa-diffusion-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    target = cache_folder() / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
                _train(recipe, Path(temporary) / "model")
                sync_tree(Path(temporary) / "model")
                (Path(temporary) / "model").rename(target)
    return target


def _train(recipe: Recipe, folder: Path) -> None:
    shown = described(questions(easy_vqa(), "train"))
    pictures, origins = close_ups(shown, recipe.cuts, recipe.seed)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        pipeline = small_pipeline(recipe.shape, VOCABULARY)
        _teach_to_carry(pipeline.vae, pictures, recipe)
        latents = _centred_latents(pipeline.vae, pictures)
        pipeline.vae.register_to_config(scaling_factor=1 / float(latents.std()))
        _teach_to_draw(
            pipeline,
            latents * pipeline.vae.config.scaling_factor,
            [shown[path] for path in origins],
            recipe,
        )
    pipeline.save_pretrained(folder)


def _teach_to_carry(vae: Any, pictures: Tensor, recipe: Recipe) -> None:
    """The autoencoder: pictures through latents and back."""

    def loss() -> Tensor:
        batch = pictures[torch.randint(len(pictures), (recipe.vae_batch,))]
        # With red, green and blue exchanged, so that no mixture of them is taken for granted.
        batch = batch[:, torch.randperm(3)]
        carried = vae.encode(batch).latent_dist
        wrong = vae.decode(carried.sample()).sample - batch
        # Absolute for sharp edges; squared, since a small shape's colour is few pixels, far off.
        off = wrong.abs().mean() + wrong.square().mean()
        # Three latents are held near what the picture is when made small, or colour comes last.
        small = torch.nn.functional.interpolate(batch, carried.mean.shape[2:], mode="area")
        off = off + (carried.mean[:, :3] - small).square().mean()
        return off + KL_WEIGHT * carried.kl().mean() / carried.mean[0].numel()

    _fit("autoencoder", loss, [vae], recipe.vae_steps, recipe.vae_rate)


@torch.no_grad()
def _centred_latents(vae: Any, pictures: Tensor) -> Tensor:
    """`pictures × channels × height × width`, not yet scaled.

    The autoencoder is changed so that every channel has mean zero, as the noise has: its pictures stay
    the same.
    """
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(64)])
    mean = latents.mean((0, 2, 3))
    vae.quant_conv.bias[: len(mean)] -= mean
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    return latents - mean[:, None, None]


def _teach_to_draw(
    pipeline: Any, latents: Tensor, shown: list[tuple[str, str]], recipe: Recipe
) -> None:
    """Text encoder and UNet together, over latents that no longer change and are made once."""
    # Few: each is encoded once per step, however many samples have it.
    known = sorted({"", *(caption(s, c) for s, c in shown), *(caption(s) for s, _ in shown)})
    tokens = pipeline.tokenizer(
        known, padding="max_length", max_length=pipeline.tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids  # fmt: skip
    # For every picture: all that is known of it, the shape alone, nothing.
    choices = torch.tensor(
        [[known.index(text) for text in (caption(s, c), caption(s), "")] for s, c in shown]
    )
    shares = torch.tensor([1 - 2 * UNSAID, UNSAID, UNSAID])
    scheduler = pipeline.scheduler

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (recipe.batch,))
        said = choices[chosen, torch.multinomial(shares, recipe.batch, replacement=True)]
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        time = torch.randint(scheduler.config.num_train_timesteps, (recipe.batch,))
        texts = pipeline.text_encoder(tokens).last_hidden_state[said]
        predicted = pipeline.unet(scheduler.add_noise(clean, noise, time), time, texts).sample
        return (predicted - scheduler.get_velocity(clean, noise, time)).square().mean()

    parts = [pipeline.text_encoder, pipeline.unet]
    _fit("text and UNet", loss, parts, recipe.steps, recipe.learning_rate)


def _fit(name: str, loss: Loss, models: list[Any], steps: int, rate: float) -> None:
    """AdamW with warm-up and cosine decay; what stays is the running average of the weights."""
    parameters: list[Tensor] = [p for model in models for p in model.train().parameters()]
    averages = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    with progress_bar(name, steps) as advance:
        for step in range(steps):
            loss_now = loss()
            loss_now.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # Shorter at first, or the random weights would count for long.
            share = 1 - min(AVERAGING, (step + 1) / (step + 10))
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], share)  # pyright: ignore
            advance(note=f"loss {float(loss_now.detach()):.3f}")
    with torch.no_grad():
        for average, parameter in zip(averages, parameters):
            parameter.copy_(average)
    for model in models:
        model.eval()
