"""Pictures and prompts, encoded once; micro-batches of them with noise.

VAE and text encoders are loaded, used and freed before the denoiser is: what stays in memory is a few
latents and prompt embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.artefacts.adapter import Adapter
from emloc.artefacts.json_files import read_json
from emloc.errors import ConfigError
from emloc_diffusion.data.images import Picture, Square, load_pictures, open_picture
from emloc_diffusion.encode.latents import LatentMoments, encode_latents
from emloc_diffusion.encode.text import encode_prompts
from emloc_diffusion.objective import Objective


@dataclass(frozen=True)
class Samples:
    """Encoded pictures.

    Attributes:
        pictures: their files and captions; mirrored ones appear twice.
        moments: of their latents.
        conditions: by name, what the denoiser is told of each (`emloc_diffusion.denoisers`).
    """

    pictures: Sequence[Picture]
    moments: LatentMoments
    conditions: dict[str, Tensor]

    def indices(self, prior: bool) -> list[int]:
        """Positions of the pictures of the subject, or of its class."""
        return [i for i, picture in enumerate(self.pictures) if picture.is_prior == prior]

    def conditions_of(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The conditions that the denoiser is given for some pictures."""
        return {name: tensor[list(chosen)] for name, tensor in self.conditions.items()}

    def latents(self, chosen: Sequence[int], generator: torch.Generator | None) -> Tensor:
        """Drawn from their moments."""
        part = LatentMoments(self.moments.mean[list(chosen)], self.moments.std[list(chosen)])
        return part.sample(generator)

    def batch(
        self, chosen: Sequence[int], objective: Objective, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """A micro-batch with noise, as `emloc_diffusion.denoisers` describes it."""
        noised = objective.draw(self.latents(chosen, generator), generator)
        return {
            "sample": noised.sample,
            "timestep": noised.timestep,
            "target": noised.target,
            **self.conditions_of(chosen),
        }


def encode_samples(
    pipeline: Path,
    options: Any,
    device: str = "cpu",
    adapter: str | None = None,
    prompts: bool = True,
) -> Samples:
    """Read and encode the pictures that the options name.

    Args:
        pipeline: the folder whose VAE and text encoders are used.
        options: of a stage, with `PictureOptions`: which pictures.
        device: that those compute on.
        adapter: folder of a LoRA that may have text encoders' in subfolders.
        prompts: whether prompts are encoded; if not, `conditions` are of the pictures alone.

    Raises:
        ConfigError: no folder of pictures is named, or the denoiser reads more than latents and prompts.
        DataError: one cannot be read.
    """
    if options.dataset is None:
        raise ConfigError("instance_data_dir is required (a folder of pictures).")
    _require_latents_alone(pipeline)
    pictures = load_pictures(
        options.dataset,
        options.instance_prompt,
        options.class_data_dir,
        options.class_prompt,
        options.resolution,
    )
    squares = [open_picture(picture, options.resolution) for picture in pictures]
    pixels = torch.stack([square.pixels for square in squares])
    if options.random_flip:
        pictures, squares = pictures * 2, squares * 2
        pixels = torch.cat([pixels, pixels.flip(-1)])
    moments = encode_latents(pipeline, pixels, device=device)
    _require_whole_patches(pipeline, moments, options.resolution)
    conditions: dict[str, Tensor] = {}
    if prompts:
        lora = Adapter.open(adapter) if adapter else None
        captions = [picture.caption for picture in pictures]
        encoded = encode_prompts(pipeline, captions, device=device, adapter=lora)
        conditions = {name: torch.stack([one[name] for one in encoded]) for name in encoded[0]}
    conditions["time_ids"] = torch.stack([_time_ids(square) for square in squares])
    return Samples(pictures, moments, conditions)


def _require_latents_alone(pipeline: Path) -> None:
    """Refuse denoisers that read another picture beside the latents (inpainting, depth, editing)."""
    for part in ("unet", "transformer"):
        path = pipeline / part / "config.json"
        config = read_json(path) if path.is_file() else {}
        reads, gives = config.get("in_channels"), config.get("out_channels")
        if isinstance(reads, int) and isinstance(gives, int) and reads > gives:
            raise ConfigError(
                f"The denoiser of {pipeline} reads {reads} channels and predicts {gives}, so it needs "
                f"another picture beside the latents, as for inpainting; use a text-to-image model."
            )


def _require_whole_patches(pipeline: Path, moments: LatentMoments, resolution: int) -> None:
    """Transformers read latents two by two."""
    side = moments.mean.shape[-1]
    if side % 2 and (pipeline / "transformer").is_dir():
        step = 2 * resolution // side
        raise ConfigError(
            f"resolution={resolution} gives latents of {side} × {side}, but the transformer of {pipeline} "
            f"reads them two by two; use a multiple of {step}."
        )


def _time_ids(square: Square) -> Tensor:
    """SDXL's: original height and width, top and left of the crop, height and width it becomes."""
    side = square.pixels.shape[-1]
    return torch.tensor([*square.original_size, *square.crop_top_left, side, side]).float()
