"""Calibration samples of images and text, drawn by seed, as micro-batches."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc.artefacts.json_files import read_json
from emloc.errors import DataError
from emloc.extend.family import Batch
from emloc.integrations.transformers.tables import dataset_names, shares
from emloc_vlm.encode import collate
from emloc_vlm.examples import Example
from emloc_vlm.loading import load_vlm_capacity
from emloc_vlm.processor import load_processor
from emloc_vlm.rows import load_examples, readable

OTHER_ROWS = frozenset(
    {"blip", "blip-2", "florence2", "git", "idefics", "idefics2", "instructblip", "instructblipvideo",
     "mllama"}
)  # fmt: skip
"""Types whose text layers read tokens of images from beside the text, by cross-attention or put in front.
Their samples go one by one, without padding."""

PIXEL_MASKS = ("pixel_attention_mask", "pixel_mask")

PATCH_MASK = "emloc_patch_mask"
"""The key of the mask of real patches, which is not for the model."""


def calibration_batches(path: Path, options: Any) -> Sequence[Batch]:
    """Samples of every data set according to its share.

    As many as `num_calibration_samples`, or until there are `num_calibration_tokens`; images of one
    size beside one another, so that a micro-batch pads little.
    """
    processor = load_processor(path, options.max_dynamic_patch)
    patch_size = _patch_size(path)
    examples = draw_examples(options, processor)
    kind = read_json(path / "config.json").get("model_type")
    size = 1 if kind in OTHER_ROWS else options.calibration_batch_size
    capacity = load_vlm_capacity(path)
    parts = (examples[start : start + size] for start in range(0, len(examples), size))
    batches = (collate(part, processor, options, capacity=capacity) for part in parts)
    return [_with_patch_mask(batch, patch_size) for batch in batches]


def draw_examples(options: Any, processor: Any) -> list[Example]:
    """The samples, by seed."""
    names = dataset_names(options) or [""]
    tables = [load_examples(options, name) for name in names]
    drawn: list[Example] = []
    for table, share in zip(tables, shares(options, [len(table) for table in tables])):
        order = random.Random(options.seed).sample(range(len(table)), len(table))
        shuffled = [table[index] for index in order]
        part: list[Example] = []
        tokens = 0
        for example in shuffled:  # where an image may be skipped, the next sample takes its place
            if _enough(options, share, len(part), tokens):
                break
            read = readable([example], options)
            part += read
            if read and options.num_calibration_tokens is not None:
                tokens += collate(read, processor, options)["input_ids"].shape[1]
        if not part:
            raise DataError(f"No image from {shuffled[0].where} on can be read.")
        drawn += part
    return drawn


def _enough(options: Any, share: float, samples: int, tokens: int) -> bool:
    if options.num_calibration_tokens is not None:
        return tokens >= options.num_calibration_tokens * share
    return samples >= max(1, round(options.num_calibration_samples * share))


def _patch_size(path: Path) -> int | None:
    config = read_json(path / "config.json")
    size = config.get("vision_config", {}).get("patch_size")
    return size if isinstance(size, int) else None


def _with_patch_mask(batch: Mapping[str, Tensor], patch_size: int | None) -> Batch:
    """Processors that pad images (Idefics3, SmolVLM, Aria) say which pixels are real; so are their patches.

    A patch is real if any of its pixels is; images that are padding altogether never reach the vision
    tower. Processors that cut images into patches themselves (LFM2-VL) say it of patches.
    """
    pixels = next((batch[name] for name in PIXEL_MASKS if name in batch), None)
    if pixels is None or patch_size is None or bool(pixels.all()):
        return batch
    if pixels.ndim == 2:
        return {**batch, PATCH_MASK: pixels.bool()}
    images = pixels.reshape(-1, *pixels.shape[-2:])
    images = images[images.flatten(1).any(dim=1)]
    patches = images.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    return {**batch, PATCH_MASK: patches.sum(dim=(-1, -2)) > 0}


def without_patch_mask(batch: Batch) -> Batch:
    """The batch as the model's forward takes it."""
    return {name: tensor for name, tensor in batch.items() if name != PATCH_MASK}


def patch_mask(batch: Batch) -> torch.Tensor | None:
    """Images × rows × columns of patches; None where all are real."""
    return batch.get(PATCH_MASK)
