"""Prompts as a denoiser takes them, by the stock pipeline's own `encode_prompt`.

The pipeline is made with its tokenizers and text encoders alone; what each pipeline does with them (which
layer, which order, what padding) stays its own affair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.artefacts.adapter import Adapter
from emloc.errors import CheckpointError, ConfigError
from emloc.integrations.peft.attach import attach_part
from emloc_diffusion.encode.components import (
    check_libraries,
    load_errors,
    read_model_index,
    release,
    whole_part,
)

TEXT_PARTS = ("text_encoder", "tokenizer")


@dataclass(frozen=True)
class PromptEncoding:
    """The way in which a pipeline class encodes.

    Attributes:
        takes_max_length: the length can be chosen; CLIP's is fixed.
        pooled: where the pooled vector is in what `encode_prompt` returns; None without one.
        arguments: further ones of `encode_prompt`: no empty prompt besides, the same text for all encoders.
        options: further ones of the pipeline's constructor.
    """

    takes_max_length: bool
    pooled: int | None
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]


ALONE: Mapping[str, Any] = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
ENCODINGS: Mapping[str, PromptEncoding] = {
    "StableDiffusionPipeline": PromptEncoding(
        False, None, ALONE, {"requires_safety_checker": False}
    ),
    "StableDiffusionXLPipeline": PromptEncoding(False, 2, ALONE, {"add_watermarker": False}),
    "StableDiffusion3Pipeline": PromptEncoding(
        True, 2, {**ALONE, "prompt_2": None, "prompt_3": None}, {}
    ),
    "FluxPipeline": PromptEncoding(True, 1, {"num_images_per_prompt": 1, "prompt_2": None}, {}),
}


def encode_prompts(
    folder: str | Path,
    prompts: Sequence[str],
    max_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    adapter: Adapter | None = None,
) -> list[dict[str, Tensor]]:
    """Per prompt `encoder_hidden_states` (tokens, width) and, but for Stable Diffusion 1 and 2, `pooled`
    (width,); on the CPU, in the text encoders' dtype.

    One prompt at a time; equal prompts are encoded once and share their tensors.

    Args:
        folder: of a diffusers pipeline, one of `ENCODINGS`.
        prompts: any texts, also empty ones; what is over the length is cut, with the pipeline's warning.
        max_length: tokens of T5, for Stable Diffusion 3 and FLUX; None is the pipeline's own.
        dtype: that the text encoders are loaded in.
        device: that they compute on.
        variant: of the weight files, such as `fp16`.
        adapter: whose subfolders hold LoRAs of text encoders, if any.

    Raises:
        MismatchError: such a LoRA was trained for another text encoder.
        CheckpointError: another pipeline class, or files that are missing or do not load.
        ConfigError: `max_length` for a pipeline without T5, or below 1.
    """
    encoder = PromptEncoder(folder, max_length, dtype, device, variant)
    for name, part in (adapter.with_parts(encoder.encoders).parts if adapter else {}).items():
        attach_part(encoder.encoders[name], part)
    encoded: dict[str, dict[str, Tensor]] = {}
    with torch.no_grad():
        for prompt in dict.fromkeys(prompts):
            made = encoder.encode([prompt])
            encoded[prompt] = {name: tensor[0].cpu() for name, tensor in made.items()}
    del encoder
    release()
    return [dict(encoded[prompt]) for prompt in prompts]


class PromptEncoder:
    """A pipeline's tokenizers and text encoders, loaded; gradients pass through.

    Args and errors: see `encode_prompts`.

    Attributes:
        encoders: the text encoders by name, in eval mode.
    """

    def __init__(
        self,
        folder: str | Path,
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        variant: str | None = None,
    ) -> None:
        index = read_model_index(folder)
        name = str(index.get("_class_name"))
        encoding = ENCODINGS.get(name)
        if encoding is None:
            raise CheckpointError(
                f"{folder} is a {name}; prompts can be encoded only for {', '.join(ENCODINGS)}."
            )
        self._keywords: dict[str, Any] = {**encoding.arguments, "device": torch.device(device)}
        if max_length is not None:
            if not encoding.takes_max_length:
                raise ConfigError(
                    f"max_length={max_length} does not apply to {name}, whose prompts have the fixed "
                    f"length of CLIP; leave it out."
                )
            if max_length < 1:
                raise ConfigError(f"max_length is {max_length}; it must be 1 or more.")
            self._keywords["max_sequence_length"] = max_length
        check_libraries(folder, index, TEXT_PARTS)
        self._pipeline = _text_pipeline(folder, index, encoding, dtype, variant)
        self._pooled = encoding.pooled
        self.encoders: dict[str, Any] = {
            part: module.to(device).eval()
            for part, module in self._pipeline.components.items()
            if part.startswith(TEXT_PARTS) and isinstance(module, torch.nn.Module)
        }

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`encoder_hidden_states` (prompts, tokens, width) and perhaps `pooled` (prompts, width)."""
        made = self._pipeline.encode_prompt(list(prompts), **self._keywords)
        tensors = {"encoder_hidden_states": made[0]}
        if self._pooled is not None:
            tensors["pooled"] = made[self._pooled]
        return tensors

    def remember(self, name: str, prompts: Sequence[str]) -> None:
        """Let a text encoder's outputs for these prompts take its place, and its memory be free."""
        remembered = Remembered(self.encoders.pop(name))
        setattr(self._pipeline, name, remembered)
        with torch.no_grad():
            for prompt in dict.fromkeys(prompts):
                self.encode([prompt])
        remembered.forget()
        release()


class Remembered(torch.nn.Module):
    """A stand-in for a text encoder: computes what it is asked first, and from then on only knows it."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.dtype, self._encoder = encoder.dtype, [encoder]
        # Pipelines ask where a module is, and look at what it holds.
        self.register_buffer("place", torch.empty(0, device=encoder.device), persistent=False)
        self._known: dict[tuple[int, ...], Tensor] = {}

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """The first of the encoder's outputs, (prompts, tokens, width)."""
        rows: list[Tensor] = []
        for row in ids:
            key = tuple(row.tolist())
            if key not in self._known:
                self._known[key] = self._encoder[0](row[None], *args, **kwargs)[0][0].detach()
            rows.append(self._known[key])
        return (torch.stack(rows),)

    def forget(self) -> None:
        """Drop the encoder."""
        self._encoder.clear()


def load_tokenizer(folder: str | Path) -> Any:
    """The pipeline's first tokenizer, CLIP's.

    Raises:
        CheckpointError: there is none, or it does not load.
    """
    from transformers import CLIPTokenizer

    with load_errors(folder, "tokenizer"):
        return CLIPTokenizer.from_pretrained(str(folder), subfolder="tokenizer")


def _text_pipeline(
    folder: str | Path,
    index: Mapping[str, Any],
    encoding: PromptEncoding,
    dtype: torch.dtype,
    variant: str | None,
) -> Any:
    """The stock pipeline without VAE, denoiser, scheduler and safety checker."""
    import diffusers  # seconds to import
    import transformers

    # What is left out is said to be, also where the folder says it: SD3 may come without T5.
    without: dict[str, Any] = {
        part: None
        for part, value in index.items()
        if isinstance(value, list) and (not part.startswith(TEXT_PARTS) or value == [None, None])
    }
    with load_errors(folder, "text encoders"):
        pipeline_class: Any = getattr(diffusers, str(index["_class_name"]))
        if "transformer" in without and index.get("text_encoder_3") == [None, None]:
            without["transformer"] = _skeleton(folder, str(index["transformer"][1]))
        encoders = {
            name: whole_part(
                folder, name, getattr(transformers, value[1]), dtype=dtype, variant=variant
            )
            for name, value in index.items()
            if name.startswith("text_encoder") and name not in without
        }
        return pipeline_class.from_pretrained(
            str(folder), **without, **encoders, **encoding.options, dtype=dtype, variant=variant,
            local_files_only=True, use_safetensors=True,
        )  # fmt: skip


def _skeleton(folder: str | Path, class_name: str) -> Any:
    """The transformer without weights: without T5, its configuration says how wide the zeros are."""
    import diffusers

    transformer_class: Any = getattr(diffusers, class_name)
    with torch.device("meta"):
        return transformer_class.from_config(
            transformer_class.load_config(str(folder), subfolder="transformer")
        )
