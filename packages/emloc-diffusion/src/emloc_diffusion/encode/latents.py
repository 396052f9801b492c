"""Pictures as latents: the posterior of the pipeline's VAE, scaled as the denoiser is trained on it.

The VAE gives a mean m and standard deviation σ per pixel; the denoiser's input is z = (x − shift) · scale
with x = m + σ·ε. Both are affine, so (m − shift) · scale and σ · scale can be kept, and a sample be drawn
anew each time. Moments are float32 whatever the VAE computed in.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from emloc.errors import CheckpointError, ConfigError, NumericalError
from emloc_diffusion.encode.components import load_errors, read_model_index, release, whole_part


@dataclass(frozen=True)
class LatentMoments:
    """The distribution that latents are drawn from.

    Attributes:
        mean: float32 on the CPU, (pictures, channels, height, width).
        std: the same shape.
    """

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Latents, float32, (pictures, channels, height, width)."""
        return self.mean + self.std * torch.randn(self.mean.shape, generator=generator)


def encode_latents(
    folder: str | Path,
    pictures: Tensor,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> LatentMoments:
    """The moments of each picture's latents.

    One picture at a time, so that memory does not grow with their number and a picture's moments do not
    depend on its neighbours: they can be cached by picture.

    Args:
        folder: of a diffusers pipeline with an `AutoencoderKL`.
        pictures: in [-1, 1], (pictures, 3, height, width).
        dtype: that the VAE computes in; float32 in place of float16 where its configuration has
            `force_upcast`, as SDXL's overflows.
        device: that it computes on.
        variant: of the weight files, such as `fp16`.

    Raises:
        CheckpointError: no VAE in the folder, another class, or files that do not load.
        ConfigError: height or width is not a multiple of what the VAE shrinks by.
        NumericalError: moments that are not finite.
    """
    vae = _load(folder, dtype, device, variant)
    config = vae.config
    shrink = 2 ** (len(config.block_out_channels) - 1)
    if pictures.ndim != 4 or pictures.shape[1] != config.in_channels:
        raise ConfigError(
            f"Pictures of shape {tuple(pictures.shape)} do not fit the VAE of {folder}; it takes (pictures, "
            f"{config.in_channels}, height, width)."
        )
    if pictures.shape[2] % shrink or pictures.shape[3] % shrink:
        raise ConfigError(
            f"Pictures of {pictures.shape[3]} × {pictures.shape[2]} do not fit the VAE of {folder}, which "
            f"turns {shrink} × {shrink} pixels into one latent; set resolution to a multiple of {shrink}."
        )
    means: list[Tensor] = []
    stds: list[Tensor] = []
    with torch.inference_mode():
        for picture in pictures:
            posterior = vae.encode(picture[None].to(vae.device, vae.dtype)).latent_dist
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
    del vae
    release()
    # Outside of inference mode, so that the moments are ordinary tensors.
    moments = _scaled(torch.cat(means), torch.cat(stds), config)
    if not (moments.mean.isfinite().all() and moments.std.isfinite().all()):
        raise NumericalError(
            f"The VAE of {folder} gives latents that are not finite in {dtype}; run it in float32."
        )
    return moments


def _load(
    folder: str | Path, dtype: torch.dtype, device: str | torch.device, variant: str | None
) -> Any:
    from diffusers import AutoencoderKL  # seconds to import

    named = read_model_index(folder).get("vae") or [None, None]
    if named[1] != AutoencoderKL.__name__:
        raise CheckpointError(
            f"The VAE of {folder} is {named[1] or 'missing'}, not an AutoencoderKL; use a Stable Diffusion "
            f"(1, 2, XL or 3) or FLUX.1 pipeline."
        )
    with load_errors(folder, "VAE"):
        config = AutoencoderKL.load_config(str(folder), subfolder="vae")
        if dtype == torch.float16 and cast(Any, config).get("force_upcast", True):
            dtype = torch.float32
        vae: Any = whole_part(folder, "vae", AutoencoderKL, variant=variant, dtype=dtype)
    return vae.to(device).eval()


def _scaled(mean: Tensor, std: Tensor, config: Any) -> LatentMoments:
    """Scale latents as the denoiser is trained on them."""
    if config.latents_mean is not None and config.latents_std is not None:  # by channel
        center, spread = (
            torch.tensor(values, dtype=torch.float32)[:, None, None]
            for values in (config.latents_mean, config.latents_std)
        )
        scale = config.scaling_factor / spread
        return LatentMoments((mean - center) * scale, std * scale)
    shift = config.shift_factor or 0.0
    return LatentMoments((mean - shift) * config.scaling_factor, std * config.scaling_factor)
