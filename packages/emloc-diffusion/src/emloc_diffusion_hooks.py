"""The plugin's entry point: says what it offers and imports nothing heavy."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from emloc.plugin import (
    IN_FEW_BITS,
    DataOptions,
    EvaluateConfig,
    FamilyEntry,
    TrainingOptions,
    hookimpl,
)
from emloc_diffusion_options import DreamBoothOptions, EvaluationOptions, PictureOptions

CLASSES = ("UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel")


def is_denoiser(config: Mapping[str, Any]) -> bool:
    """Return whether a parsed `config.json` is of a denoiser that we can call."""
    return config.get("_class_name") in CLASSES


ORIGINAL_NAMES = ("model.diffusion_model.", "double_blocks.")
"""The beginnings of denoisers' tensor names in files of the original layouts."""


def is_original(names: Collection[str]) -> bool:
    """Return whether a file with tensors of these names is a model in its original layout."""
    return any(name.startswith(ORIGINAL_NAMES) for name in names)


@hookimpl
def emloc_register_families() -> Sequence[FamilyEntry]:
    """Diffusion models."""
    return [
        FamilyEntry(
            name="diffusion",
            summary="diffusers pipelines: Stable Diffusion 1, 2, XL and 3, FLUX.1",
            target="emloc_diffusion.family:DiffusionFamily",
            recognises=is_denoiser,
            single_file="emloc_diffusion.single_file:OriginalLayout",
            recognises_file=is_original,
            options={
                DataOptions: PictureOptions,
                TrainingOptions: DreamBoothOptions,
                EvaluateConfig: EvaluationOptions,
            },
            offers=(IN_FEW_BITS,),
        )
    ]
