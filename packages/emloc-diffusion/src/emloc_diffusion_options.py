"""Options of the stages that only diffusion models have; imports nothing heavy.

They bear the names of diffusers' DreamBooth scripts. Where core has an option of the same meaning under
transformers' name, either may be used.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from emloc.config import StageConfig
from emloc.options.marks import NamesData, NamesFiles, OfNewLora, WithoutEffect
from emloc.options.types import Names

ALIASES = {
    "instance_data_dir": "dataset",
    "train_batch_size": "per_device_train_batch_size",
    "max_train_steps": "max_steps",
}
"""diffusers' names and core's."""


class _Aliased(StageConfig):
    @model_validator(mode="before")
    @classmethod
    def _use_core_names(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = dict(values)
        for alias, name in ALIASES.items():
            if given.get(alias) is None:
                continue
            of_data = name == "dataset"
            value = str(Path(given[alias]).expanduser()) if of_data else given[alias]
            before = (
                str(Path(given[name]).expanduser())
                if of_data and given.get(name)
                else given.get(name)
            )
            if name in given and str(before) != str(value):
                raise ValueError(f"{alias} and {name} mean the same; give one of them")
            given[name] = value
            if not of_data:  # or a stage that changes the option would be told that they differ
                del given[alias]
        return _with_optim(given)


def _with_optim(given: dict[str, Any]) -> dict[str, Any]:
    """diffusers' two options for the optimiser as the one of core."""
    optimizer, eight_bits = given.get("optimizer"), given.get("use_8bit_adam")
    if optimizer == "prodigy" and eight_bits:
        raise ValueError("use_8bit_adam is for AdamW, not Prodigy; leave one of them out")
    name = {"prodigy": "prodigy", "adamw": "adamw_torch_fused"}.get(str(optimizer))
    name = "adamw_8bit" if eight_bits else name
    if name is None:
        return given
    if given.get("optim", name) != name:
        raise ValueError(
            f"optim = {given['optim']} contradicts optimizer or use_8bit_adam; give only one"
        )
    return {**given, "optim": name}


class PictureOptions(_Aliased):
    """Options for pictures and for what they are said to show."""

    instance_data_dir: Annotated[Path | None, NamesData(), WithoutEffect()] = Field(
        None, description="folder of pictures; same as dataset"
    )
    instance_prompt: str | None = Field(
        None, description="caption of every picture; by default name.txt beside name.png"
    )
    class_data_dir: Annotated[Path | None, NamesFiles(), NamesData()] = Field(
        None, description="pictures of the class, for prior preservation"
    )
    class_prompt: str | None = Field(None, description="caption of the class pictures")
    resolution: int = Field(
        512, ge=8, description="side of the square that pictures are resized and cropped to"
    )
    random_flip: bool = Field(False, description="also train on mirrored pictures")


class DreamBoothOptions(_Aliased):
    """Options for how a LoRA learns a subject."""

    train_batch_size: int | None = Field(None, description="same as per_device_train_batch_size")
    max_train_steps: int | None = Field(None, description="same as max_steps")
    optimizer: Literal["adamw", "prodigy"] | None = Field(
        None, description="optim, as diffusers names it"
    )
    use_8bit_adam: bool = Field(False, description="same as optim=adamw_8bit")
    prior_loss_weight: float = Field(1.0, ge=0, description="weight of the loss on class pictures")
    train_text_encoder: bool = Field(
        False, description="also train a LoRA on the CLIP text encoders, which are not compressed"
    )
    lora_conv: Annotated[bool, OfNewLora()] = Field(
        False, description="all-linear includes convolutions"
    )
    validation_prompt: str | None = Field(None, description="prompt drawn during training")
    num_validation_images: int = Field(4, ge=1, description="pictures per validation")
    validation_steps: int = Field(100, ge=1, description="steps between validations")
    num_inference_steps: int = Field(25, ge=1, description="steps of drawing a picture")


class NoiseOptions(StageConfig):
    """Options for the noise on which evaluate measures the loss."""

    num_noise_samples: int = Field(
        64,
        ge=1,
        description="held-out noise samples to measure the loss on; at least one for each picture",
    )


class EvaluationOptions(NoiseOptions):
    """Options for what evaluate draws, if anything: pictures of a subject that are scored, a contact
    sheet.
    """

    dino_model: Annotated[str | None, NamesFiles()] = Field(
        None,
        description="scores fidelity to the subject: a DINO of timm or transformers, or a folder",
    )
    clip_model: Annotated[str | None, NamesFiles()] = Field(
        None,
        description="scores fidelity to subject and prompt: a CLIP of transformers, or a folder",
    )
    subject_token: str | None = Field(None, description="the rare word that names the subject: sks")
    class_name: str | None = Field(None, description="what the subject is: dog, backpack, …")
    subject_kind: Literal["object", "live"] = Field(
        "object", description="which of DreamBooth's two prompt lists to draw"
    )
    prompts_file: Annotated[Path | None, NamesFiles()] = Field(
        None, description="prompts to draw instead: one per line, each with the subject_token"
    )
    contact_sheet_adapters: Annotated[Names, NamesFiles()] = Field(
        [], description="rows of contact_sheet.png, between the base and the adapter"
    )
    validation_prompt: str | None = Field(
        None, description="prompt drawn on contact_sheet.png; by default each scored prompt once"
    )
    num_images_per_prompt: int = Field(
        4, ge=1, description="pictures per prompt, each with its own seed"
    )
    drawing_seed: int = Field(0, ge=0, description="seed of each prompt's first picture")
    guidance_scale: float | None = Field(None, ge=0, description="by default the pipeline's own")
    num_inference_steps: int | None = Field(
        None, ge=1, description="denoising steps per picture; by default the pipeline's own"
    )
