"""A tiny random pipeline and pictures, on which every stage runs in seconds."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from emloc_diffusion.example_pipelines import RESOLUTION, write_pipeline


def write_pictures(folder: Path, count: int, seed: int) -> Path:
    """Squares of several colours, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for index in range(count):
        picture = Image.new("RGB", (RESOLUTION, RESOLUTION), "#f0f0f0")
        left, top = draw.randint(2, 30), draw.randint(2, 30)
        color = tuple(draw.randint(0, 255) for _ in range(3))
        ImageDraw.Draw(picture).rectangle((left, top, left + 25, top + 25), fill=color)
        picture.save(folder / f"{index}.png")
    return folder


def write_example(folder: Path, seed: int) -> Mapping[str, Any]:
    """See `ModelFamily.write_example`."""
    return {
        "model_name_or_path": str(write_pipeline(folder / "model", "sd", seed)),
        "dataset": str(write_pictures(folder / "pictures", 5, seed)),
        "instance_prompt": "a photo of sks square",
        "resolution": RESOLUTION,
    }
