"""Vision-language models: any `AutoModelForImageTextToText` whose towers hold `nn.Linear`."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, Trainer

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.config import CalibrationOptions, DataOptions, DemoConfig, EvaluateConfig
from emloc.extend.family import Batch
from emloc.integrations.transformers.family import TransformersFamily
from emloc.integrations.transformers.loss import next_token_loss
from emloc.integrations.transformers.sampling import TrainingData
from emloc.planning.operations import Layer
from emloc.planning.step import StepOptions, StepSizes
from emloc_vlm.calibration import calibration_batches, patch_mask, without_patch_mask
from emloc_vlm.data_files import files_of_rows
from emloc_vlm.internvl_chat import is_internvl_chat, native_view
from emloc_vlm.internvl_chat_config import native_config
from emloc_vlm.parts import frozen_modules, part_of, sees
from emloc_vlm.planned import largest_batch
from emloc_vlm.training import training_data


class VLMFamily(TransformersFamily):
    """`ModelFamily` for vision-language models."""

    name = "vlm"
    auto_class = AutoModelForImageTextToText
    task_type = "CAUSAL_LM"  # images are part of what precedes the text
    towers = ("vision_config", "text_config")
    trainer_class = Trainer

    def native(self, checkpoint: Checkpoint) -> Checkpoint:
        """OpenGVLab's InternVL checkpoints as transformers' own class would have stored them."""
        if not is_internvl_chat(checkpoint.config):
            return checkpoint
        if isinstance(checkpoint, Described):
            return checkpoint.having(native_config(checkpoint.config))
        return native_view(checkpoint)

    def forwards(self, model: nn.Module) -> Sequence[Callable[[Any], Any]]:
        """Forwards of text, and of a picture through the vision tower alone."""
        vision = cast(Any, model).config.vision_config

        def read(fake: Any) -> None:
            ids = torch.zeros(1, 4, dtype=torch.int64)
            fake(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

        def look(fake: Any) -> None:
            size = getattr(vision, "image_size", 224)
            height, width = (size, size) if isinstance(size, int) else size
            channels = getattr(vision, "num_channels", 3)
            pixels = torch.zeros(1, channels, height, width, dtype=torch.bfloat16)
            vision_tower(fake)(pixels)

        return [read, look]

    def calibration_batches(
        self, checkpoint: Checkpoint, options: CalibrationOptions
    ) -> Sequence[Batch]:
        """See `ModelFamily`; `emloc_vlm.calibration`."""
        return calibration_batches(checkpoint.path, options)

    def token_mask(self, batch: Batch, layer: str | None = None) -> Tensor | None:
        """Text layers skip padded tokens, those of the vision tower and the projector the patches of padded
        image borders; a projector that makes other tokens of patches does not fit their mask."""
        if layer is not None and part_of(layer) != "language":
            return patch_mask(batch)
        return super().token_mask(batch, layer)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See `ModelFamily`; `next_token_loss`."""
        return next_token_loss(model, without_patch_mask(batch))

    def data(self, checkpoint: Checkpoint, options: Any) -> TrainingData:
        """See `TransformersFamily`; `emloc_vlm.training`."""
        return training_data(checkpoint, options)

    def frozen(self, model: nn.Module, options: Any) -> Container[str]:
        """The modules of the parts that are not trained."""
        return frozen_modules(model, options)

    def data_files(self, options: DataOptions, dataset: str, split: str) -> Iterable[Path]:
        """See `NamesDataFiles`: images, and what a meta file or a benchmark's puts beside it."""
        return files_of_rows(options, dataset, split)

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """See `Evaluates`; `emloc_vlm.evaluation`."""
        from emloc_vlm.evaluation import evaluate_model

        return evaluate_model(config, self)

    def demo(self, config: DemoConfig) -> Path:
        """See `HasDemo`; `emloc_vlm.demo`."""
        from emloc_vlm.demo.demo import run_demo

        return run_demo(config)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """See `WritesExample`; `emloc_vlm.example`."""
        from emloc_vlm.example import write_example

        return write_example(folder, seed)

    def planned_batch(self, checkpoint: Checkpoint, options: Any, samples: int) -> Batch:
        """See `PlannedFamily`; `emloc_vlm.planned`."""
        return largest_batch(checkpoint, options, samples)

    def trainers_loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """The loss as transformers' Trainer computes it, where all tokens are labelled."""
        return model(**batch, use_cache=False, num_items_in_batch=1).loss, batch["labels"].numel()

    def step_sizes(
        self, model: nn.Module, layers: Mapping[str, Layer], batch: Batch, options: StepOptions
    ) -> StepSizes | None:
        """See `PlannedFamily`; `emloc_vlm.activations`."""
        from emloc_vlm.activations import step_sizes

        return step_sizes(model, layers, batch, options)


def vision_tower(model: Any) -> Any:
    """The module that reads pixels, by the name that the architecture gives it."""
    for name, module in model.named_modules():
        if name and sees(name):
            return module
    raise AttributeError("the model has no vision tower")
