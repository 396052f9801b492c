"""Vision-language models: any `AutoModelForImageTextToText` whose towers hold `nn.Linear`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.described import Described
from emloc.config import CalibrationOptions, DataOptions, DemoConfig, EvaluateConfig, TrainConfig
from emloc.extend.family import Batch, EmulatorLayers, StoredParameter
from emloc.integrations.transformers.conversion import module_name, stored_parameter
from emloc.integrations.transformers.loss import next_token_loss
from emloc.integrations.transformers.quantizer import emulator_config
from emloc.integrations.transformers.skeleton import (
    empty_model,
    linears_within,
    repeated_blocks,
    shared_input_groups,
    shared_linears,
)
from emloc.integrations.transformers.untying import untied_config
from emloc_vlm.calibration import calibration_batches, patch_mask, without_patch_mask
from emloc_vlm.data_files import files_of_rows
from emloc_vlm.internvl_chat import is_internvl_chat, native_view
from emloc_vlm.internvl_chat_config import native_config
from emloc_vlm.parts import part_of
from emloc_vlm.planned import PlannedVLM
from emloc_vlm.rows import CalibrationVisualOptions, VisualOptions


class VLMFamily(PlannedVLM):
    """`ModelFamily` for vision-language models."""

    name = "vlm"
    adapter_formats: tuple[str, ...] = ("peft",)

    def native(self, checkpoint: Checkpoint) -> Checkpoint:
        """OpenGVLab's InternVL checkpoints as transformers' own class would have stored them."""
        if not is_internvl_chat(checkpoint.config):
            return checkpoint
        if isinstance(checkpoint, Described):
            return checkpoint.having(native_config(checkpoint.config))
        return native_view(checkpoint)

    def skeleton(self, checkpoint: Checkpoint, dtype: torch.dtype) -> nn.Module:
        """See `ModelFamily`."""
        return empty_model(checkpoint, AutoModelForImageTextToText, dtype)

    def stored(
        self, model: nn.Module, parameter: str, checkpoint: Checkpoint
    ) -> StoredParameter | None:
        """See `ModelFamily`."""
        return stored_parameter(model, parameter, checkpoint)

    def module_name(self, model: nn.Module, name: str) -> str:
        """See `KnowsOlderNames`."""
        return module_name(model, name)

    def untied_config(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Any] | None:
        """See `UntiesWeights`."""
        return untied_config(checkpoint, model)

    def blocks(self, model: nn.Module) -> Sequence[str]:
        """Of both towers, the vision tower's first."""
        return repeated_blocks(model)

    def layer_groups(self, model: nn.Module) -> Sequence[Sequence[str]]:
        """See `ModelFamily`; the towers are traced one by one."""
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

        return shared_input_groups(model, linears_within(model, self.blocks(model)), read, look)

    def kept_dense(self, model: nn.Module) -> Mapping[str, str]:
        """See `ModelFamily`; linear layers of blocks are compressed where their weight is their own."""
        return shared_linears(model, self.blocks(model))

    def calibration_batches(
        self, checkpoint: Checkpoint, options: CalibrationOptions
    ) -> Sequence[Batch]:
        """See `ModelFamily`; `emloc_vlm.calibration`."""
        return calibration_batches(checkpoint.path, cast(CalibrationVisualOptions, options))

    def token_mask(self, batch: Batch, layer: str | None = None) -> Tensor | None:
        """Text layers skip padded tokens, those of the vision tower and the projector the patches of padded
        image borders; a projector that makes other tokens of patches does not fit their mask."""
        if layer is not None and part_of(layer) != "language":
            return patch_mask(batch)
        mask = batch["attention_mask"].bool()
        return None if layer is not None and bool(mask.all()) else mask

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        """See `ModelFamily`; `next_token_loss`."""
        return next_token_loss(model, without_patch_mask(batch))

    def emulator_config(self, checkpoint: Checkpoint, layers: EmulatorLayers) -> dict[str, Any]:
        """See `ModelFamily`."""
        return emulator_config(checkpoint, layers)

    def data_files(self, options: DataOptions, dataset: str, split: str) -> Iterable[Path]:
        """See `NamesDataFiles`: images, and what a meta file or a benchmark's puts beside it."""
        return files_of_rows(cast(VisualOptions, options), dataset, split)

    def train(self, config: TrainConfig, work: Path) -> dict[str, Any]:
        """See `ModelFamily`; `emloc_vlm.training`."""
        from emloc_vlm.training import train_lora

        return train_lora(config, work)

    def export_adapter(self, checkpoint: Checkpoint, folder: Path) -> Sequence[str]:
        """See `ModelFamily`; PEFT's format is the one that everybody reads."""
        return ()

    def evaluate(self, config: EvaluateConfig) -> dict[str, Any]:
        """See `ModelFamily`; `emloc_vlm.evaluation`."""
        from emloc_vlm.evaluation import evaluate_model

        return evaluate_model(config, self)

    def demo(self, config: DemoConfig) -> Path:
        """See `ModelFamily`; `emloc_vlm.demo`."""
        from emloc_vlm.demo.demo import run_demo

        return run_demo(config)

    def write_example(self, folder: Path, seed: int) -> Mapping[str, Any]:
        """See `ModelFamily`; `emloc_vlm.example`."""
        from emloc_vlm.example import write_example

        return write_example(folder, seed)


def vision_tower(model: Any) -> Any:
    """The module that reads pixels, by the name that the architecture gives it."""
    for name, module in model.named_modules():
        if name and part_of(name) == "vision":
            return module
    raise AttributeError("the model has no vision tower")
