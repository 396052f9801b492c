"""The pictures of a new subject, with those of its class if any, and how one is cut to a square.

A folder of pictures is read once at the start, each picture decoded, so that a broken file is known
before the model is loaded and not an hour later.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from emloc.errors import ConfigError, DataError
from emloc.integrations.pictures import PIXEL_LIMIT, read_picture
from emloc.machine.progress import console, warn
from emloc_diffusion.data.folder import picture_files, some
from emloc_diffusion.data.prompts import read_caption

FEW = 3


@dataclass(frozen=True)
class Picture:
    """A picture file and what it shows.

    Attributes:
        path: the file.
        caption: the prompt that it is trained with.
        is_prior: of the class, for prior preservation, and not of the subject.
    """

    path: Path
    caption: str
    is_prior: bool = False


@dataclass(frozen=True)
class Square:
    """A picture as a model takes it, with what SDXL is told of its making.

    Attributes:
        pixels: float32 in [-1, 1], (3, resolution, resolution).
        original_size: height and width of the upright file.
        crop_top_left: top and left of the square, in the resized picture.
    """

    pixels: Tensor
    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]


def load_pictures(
    instance_data_dir: str | Path,
    instance_prompt: str | None = None,
    class_data_dir: str | Path | None = None,
    class_prompt: str | None = None,
    resolution: int | None = None,
) -> list[Picture]:
    """All pictures, by name: the subject's, then those of its class.

    Args:
        instance_data_dir: folder of the subject's pictures; folders in it are not looked into.
        instance_prompt: the caption of all of them; None reads `name.txt` beside `name.png`.
        class_data_dir: folder of pictures of the class, for prior preservation.
        class_prompt: the caption of all of those.
        resolution: that they will be cut to; pictures that are smaller bring a warning.

    Raises:
        DataError: a folder is missing or has no pictures; a picture is unreadable; a caption is missing.
        ConfigError: only one of `class_data_dir` and `class_prompt`, or both folders are one.
    """
    instance_dir = Path(instance_data_dir)
    if (class_data_dir is None) != (class_prompt is None):
        given, other = "class_data_dir", "class_prompt"
        if class_data_dir is None:
            given, other = other, given
        raise ConfigError(f"{given} is set without {other}; prior preservation needs both.")
    if class_data_dir is not None and Path(class_data_dir).resolve() == instance_dir.resolve():
        raise ConfigError(
            f"class_data_dir and instance_data_dir are both {instance_dir}; the class needs pictures other "
            f"than the subject's."
        )
    files = picture_files(instance_dir, "instance_data_dir", instance_prompt is None)
    pictures = [
        Picture(path, read_caption(path) if instance_prompt is None else instance_prompt)
        for path in files
    ]
    if len(files) < FEW:
        warn(
            f"{instance_dir} has only {len(files)} picture{'s' * (len(files) > 1)}; three to five from "
            f"different angles teach a subject better"
        )
    blank = [picture.path.name for picture in pictures if not picture.caption.strip()]
    if blank:
        warn(f"{len(blank)} captions are empty: {some(blank)}")
    if class_data_dir is not None and class_prompt is not None:
        pictures += [
            Picture(path, class_prompt, is_prior=True)
            for path in picture_files(Path(class_data_dir), "class_data_dir", False)
        ]
    sizes = {picture.path: read_upright(picture.path).size for picture in pictures}
    _say_sizes(sizes, resolution)
    return pictures


def open_picture(
    picture: Picture,
    resolution: int,
    center_crop: bool = True,
    random_flip: bool = False,
    generator: random.Random | None = None,
) -> Square:
    """Resize the shorter side to `resolution` (Lanczos) and crop the longer one.

    Args:
        picture: upright by its EXIF rotation; what is transparent becomes white.
        resolution: side of the square in pixels.
        center_crop: the middle; otherwise a random place.
        random_flip: mirror left and right, half the times.
        generator: of the random place and flip; None takes Python's own.

    Raises:
        DataError: the file is missing or broken, or far too narrow; names it.
    """
    draw: Any = generator or random
    image = read_upright(picture.path)
    width, height = image.size
    scale = resolution / min(width, height)
    resized = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    if resized[0] * resized[1] > PIXEL_LIMIT:
        raise DataError(
            f"{picture.path}: the picture is {width} × {height}, too narrow to be cropped to a square of "
            f"{resolution} pixels; crop it yourself or take it out of the folder."
        )
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.LANCZOS)
    if random_flip and draw.random() < 0.5:
        image = ImageOps.mirror(image)
    spare = (resized[0] - resolution, resized[1] - resolution)
    left, top = (side // 2 if center_crop else draw.randint(0, side) for side in spare)
    image = image.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0)
    return Square(pixels.permute(2, 0, 1).contiguous(), (height, width), (top, left))


def read_upright(path: Path) -> Image.Image:
    """The decoded picture in RGB, turned as its EXIF says; what is transparent becomes white.

    Raises:
        DataError: the file is missing or broken; names it.
    """
    try:
        return read_picture(path, f"{path}: the picture", "replace it or take it out of the folder")
    except FileNotFoundError as problem:
        raise DataError(f"{path}: this picture no longer exists.") from problem


def _say_sizes(sizes: Mapping[Path, tuple[int, int]], resolution: int | None) -> None:
    """One line on pictures that will be enlarged, one on mixed sizes."""
    if resolution is not None:
        small = {path: size for path, size in sizes.items() if min(size) < resolution}
        if small:
            path, (width, height) = min(small.items(), key=lambda item: min(item[1]))
            others = f" (and {len(small) - 1} more)" if len(small) > 1 else ""
            warn(
                f"{path.name} is {width} × {height}{others}, "
                f"{resolution - min(width, height)} pixels short of resolution={resolution}; it will be "
                f"enlarged and look soft"
            )
    if len(set(sizes.values())) > 1:
        console.print(
            f"the pictures have {len(set(sizes.values()))} different sizes; each is resized by its shorter "
            f"side and cropped to a square"
        )
