"""Data of the toy family: safetensors files of `pictures` and the `labels` of their classes."""

from collections.abc import Iterator
from math import ceil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from emloc.artefacts.digest import data_names
from emloc.config import CalibrationOptions, DataOptions, TrainConfig
from emloc.errors import ConfigError, DataError
from emloc.extend.family import Batch
from emloc.testing.toy_model import ToySizes


def read_pictures(options: DataOptions) -> Batch:
    """All pictures that the options name, samples × channels × height × width, with their labels.

    Raises:
        ConfigError: they name none.
        DataError: a file cannot be read, or is of something else.
    """
    if options.dataset is None:
        raise ConfigError("dataset is required: a safetensors file of pictures and labels.")
    parts: list[Batch] = []
    for name in data_names(options.dataset):
        try:
            tensors = load_file(name)
            parts.append({key: tensors[key] for key in ("pictures", "labels")})
        except (OSError, KeyError, ValueError) as problem:
            raise DataError(
                f"{name} is no safetensors file of pictures and labels ({problem}); pass one."
            ) from problem
    return {key: torch.cat([part[key] for part in parts]) for key in ("pictures", "labels")}


def drawn_batches(options: CalibrationOptions) -> list[Batch]:
    """Micro-batches of samples drawn by seed, in the order that they were drawn in."""
    pictures = read_pictures(options)
    drawn = _order(pictures, options.seed)[: options.num_calibration_samples]
    return [_rows(pictures, part) for part in drawn.split(options.calibration_batch_size)]


def training_batches(config: TrainConfig) -> Iterator[Batch]:
    """The micro-batches of all steps, shuffled by seed in each epoch."""
    pictures, size = read_pictures(config), config.per_device_train_batch_size
    per_epoch = ceil(len(pictures["labels"]) / size)
    left = config.max_steps if config.max_steps > 0 else ceil(config.num_train_epochs * per_epoch)
    epoch = 0
    while left > 0:
        for part in _order(pictures, config.seed + epoch).split(size)[:left]:
            yield _rows(pictures, part)
            left -= 1
        epoch += 1


def rows_in_batches(pictures: Batch, samples: int | None, size: int) -> list[Batch]:
    """The first so many samples (None: all) in their order, in micro-batches of a size."""
    first = torch.arange(len(pictures["labels"]))[:samples]
    return [_rows(pictures, part) for part in first.split(size)]


def on_device(batch: Batch, device: str) -> Batch:
    """A micro-batch on a device."""
    return {name: tensor.to(device) for name, tensor in batch.items()}


def write_pictures(path: Path, sizes: ToySizes, samples: int, seed: int) -> None:
    """Save random pictures, each labelled with the class of its mean."""
    draw = torch.Generator().manual_seed(seed)
    shape = (samples, sizes.channels, sizes.side, sizes.side)
    pictures = torch.randn(shape, generator=draw) + torch.randn(samples, 1, 1, 1, generator=draw)
    labels = ((pictures.mean((1, 2, 3)) + 2) / 4 * sizes.classes).long().clamp(0, sizes.classes - 1)
    save_file({"pictures": pictures, "labels": labels}, path)


def _order(pictures: Batch, seed: int) -> torch.Tensor:
    return torch.randperm(len(pictures["labels"]), generator=torch.Generator().manual_seed(seed))


def _rows(pictures: Batch, chosen: torch.Tensor) -> Batch:
    return {key: tensor[chosen] for key, tensor in pictures.items()}
