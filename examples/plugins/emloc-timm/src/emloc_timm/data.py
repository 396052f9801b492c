"""Pictures with their classes: folders of class folders, or JSONL files of `image` and `label`."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from emloc.plugin import Batch, Checkpoint, DataError, DataOptions


class Pictures:
    """Every sample that the options name, in order; a picture is opened when it is needed."""

    def __init__(self, checkpoint: Checkpoint, options: DataOptions) -> None:
        names = [name for name in (options.dataset or "").split(",") if name]
        self.rows = [row for name in names for row in rows(Path(name))]
        classes = sorted({label for _, label in self.rows}, key=in_order)
        if len(classes) != (expected := checkpoint.config["num_classes"]):
            raise DataError(
                f"{options.dataset} has {len(classes)} classes, and {checkpoint.name} tells "
                f"{expected} apart; pass data of as many classes."
            )
        self.numbers = {label: number for number, label in enumerate(classes)}
        about = resolve_data_config(pretrained_cfg=checkpoint.config["pretrained_cfg"])
        self.transform: Any = create_transform(**about, is_training=False)

    def batch(self, chosen: Iterable[int]) -> Batch:
        """A micro-batch of the samples with these numbers."""
        part = [self.rows[number] for number in chosen]
        labels = torch.tensor([self.numbers[label] for _, label in part])
        return {"pixels": torch.stack([self.pixels(path) for path, _ in part]), "labels": labels}

    def pixels(self, path: Path) -> torch.Tensor:
        """A picture as the model reads it."""
        try:
            with Image.open(path) as picture:
                return self.transform(picture.convert("RGB"))
        except Exception as problem:  # decoders of damaged files raise nearly anything
            raise DataError(f"{path} is no picture that can be read; remove it.") from problem


def class_of(label: Any) -> str:
    """A label as the name of its class: text, or a whole number."""
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise TypeError(f"{label!r} names no class")
    return str(label)


def in_order(label: str) -> list[tuple[int, str]]:
    """The key that sorts classes as timm does: numbers in names count as numbers, so 2 is before 10."""
    parts = re.split(r"(\d+)", label)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def rows(dataset: Path) -> list[tuple[Path, str]]:
    """The pictures of a data set, each with the name of its class."""
    if dataset.is_dir():
        return [(path, path.parent.name) for path in sorted(dataset.glob("*/*"))]
    try:
        parsed = [json.loads(line) for line in dataset.read_text("utf-8").splitlines() if line]
        return [(dataset.parent / row["image"], class_of(row["label"])) for row in parsed]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        what = "is neither a folder of class folders nor a JSONL file of image and label"
        raise DataError(f"{dataset} {what}; pass one of them.") from problem
