"""The loss of denoising: squared errors of the prediction, one per element of the latents."""

from typing import Any

import torch
from torch import Tensor

from emloc.extend.family import Batch
from emloc_diffusion.denoisers import DENOISERS


def squared_errors(model: Any, batch: Batch) -> Tensor:
    """Squared error of every element, samples × channels × height × width, in float32 or better.

    Args:
        model: a denoiser, maybe within PEFT.
        batch: see `emloc_diffusion.denoisers`; on the model's device. All but time steps are converted to
            its dtype.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    given = {
        # UNets embed it in single precision, where bfloat16 would make 980 of step 981. Transformers such as
        # FLUX round it themselves, in diffusers' pipelines as well.
        name: tensor if name == "timestep" else tensor.to(base.dtype)
        for name, tensor in batch.items()
    }
    predicted = DENOISERS[type(base).__name__].predict(model, given)
    high = torch.promote_types(predicted.dtype, torch.float32)
    return (predicted.to(high) - given["target"].to(high)).square()
