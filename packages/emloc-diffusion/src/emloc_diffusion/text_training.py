"""Text encoders that are trained along: prompts go through them in every step.

CLIP's are adapted, in their attention, as in diffusers' scripts; T5 is not, and its outputs for the few
prompts of a subject take its place.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.errors import ConfigError
from emloc.integrations.peft.parts import Part
from emloc_diffusion.encode.text import PromptEncoder

CLIP = "clip_text_model"
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class TextTraining:
    """The prompts of a training run.

    Args:
        pipeline: folder of the pipeline or emulator.
        captions: per picture.
        dtype: that the text encoders are loaded in.
        device: that they compute on.
        checkpoint: whether activations are computed again in the backward pass.

    Raises:
        ConfigError: the pipeline has no CLIP text encoder.
        CheckpointError: its text encoders cannot be loaded.
    """

    def __init__(
        self,
        pipeline: Path,
        captions: Sequence[str],
        dtype: torch.dtype,
        device: str,
        checkpoint: bool,
    ) -> None:
        self._captions = captions
        self._encoder = PromptEncoder(pipeline, dtype=dtype, device=device)
        clip = {n: e for n, e in self._encoder.encoders.items() if e.config.model_type == CLIP}
        if not clip:
            raise ConfigError(
                f"train_text_encoder: {pipeline} has no CLIP text encoder; leave it out."
            )
        for name in self._encoder.encoders.keys() - clip.keys():
            self._encoder.remember(name, captions)
        for encoder in clip.values() if checkpoint else ():
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        self.parts: Mapping[str, Part] = {n: Part(e, TARGETS) for n, e in clip.items()}

    def conditions(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The conditions that the denoiser is given for some pictures, by the text encoders as they are
        now.
        """
        captions = [self._captions[position] for position in chosen]
        unique = list(dict.fromkeys(captions))
        rows = torch.tensor([unique.index(caption) for caption in captions])
        return {
            name: tensor[rows.to(tensor.device)]
            for name, tensor in self._encoder.encode(unique).items()
        }

    @property
    def modules(self) -> dict[str, Any]:
        """The adapted encoders, by name."""
        return {name: part.model for name, part in self.parts.items()}
