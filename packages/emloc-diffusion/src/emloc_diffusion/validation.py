"""Pictures of the validation prompt while training, on disk and for TensorBoard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from emloc_diffusion.drawing import draw, load_pipeline

FOLDER = "validation"


class DrawValidation(TrainerCallback):
    """Draws with the model in training every so many steps; what is random in training is not touched.

    Args:
        pipeline: folder whose other components are used; they are loaded for as long as it takes.
        component: the denoiser's name there.
        prompt, count, resolution, inference_steps: of the pictures.
        every: training steps.
        work: where `validation/step-N-i.png` goes.
        tensorboard: whether they are logged there as well.
        encoders: text encoders that are in training too, by name.
    """

    def __init__(
        self,
        pipeline: Path,
        component: str,
        prompt: str,
        count: int,
        resolution: int,
        inference_steps: int,
        every: int,
        work: Path,
        tensorboard: bool,
        encoders: Mapping[str, Any],
    ) -> None:
        self._pipeline, self._component, self._prompt = pipeline, component, prompt
        self._count, self._resolution, self._steps = count, resolution, inference_steps
        self._every, self._work, self._tensorboard = every, work, tensorboard
        self._encoders = encoders

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw, if it is time."""
        if state.global_step % self._every and state.global_step != state.max_steps:
            return
        model = kwargs["model"].get_base_model()
        drawing = {self._component: model, **self._encoders}
        training = model.training
        for module in drawing.values():
            module.eval()
        pipeline = load_pipeline(self._pipeline, str(model.device), dtype=model.dtype, **drawing)
        pictures = draw(pipeline, [self._prompt], self._count, self._resolution, self._steps)
        for module in drawing.values():
            module.train(training)
        (self._work / FOLDER).mkdir(exist_ok=True)
        for index, picture in enumerate(pictures):
            picture.save(self._work / FOLDER / f"step-{state.global_step}-{index}.png")
        if self._tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            with SummaryWriter(str(self._work / "runs" / FOLDER)) as writer:
                stacked = np.stack([np.asarray(picture) for picture in pictures])
                writer.add_images(self._prompt, stacked, state.global_step, dataformats="NHWC")
