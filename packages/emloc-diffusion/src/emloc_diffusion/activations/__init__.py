"""A training step of a denoiser in sizes: UNets of Stable Diffusion, and FLUX's transformer."""

from collections.abc import Mapping

from torch import nn

from emloc.extend.family import Batch
from emloc.planning.operations import Layer
from emloc.planning.step import StepOptions, StepSizes
from emloc_diffusion.activations.flux import flux_sizes
from emloc_diffusion.activations.unet import unet_sizes

FORMS = {"UNet2DConditionModel": unet_sizes, "FluxTransformer2DModel": flux_sizes}


def step_sizes(
    model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
) -> StepSizes | None:
    """See `PlannedFamily`; None for other denoisers, which are traced."""
    form = FORMS.get(type(model).__name__)
    return None if form is None else form(model, layers, batch, options)
