"""easy-VQA's pictures, cut so that the shape fills much of what is seen.

In the originals a shape may be a few pixels anywhere on 64 × 64; a small model learns to draw it in
minutes if it is near and large.
"""

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from emloc_diffusion.data.images import read_upright
from emloc_diffusion.demo.small_stable_diffusion import PIXELS

SMALLEST = 14
"""Pixels across, of the shape in the original; fewer would be blurred when enlarged."""

AROUND = (1.35, 1.9)
"""Side of the cut, over the longer side of the shape."""

STANDS_OUT = 40
"""Largest difference from the background in one colour, of 255, from which a pixel is the shape's."""


def close_up(picture: Image.Image, draw: random.Random) -> Image.Image | None:
    """`PIXELS × PIXELS` with the whole shape in it; None where the shape is too small.

    Args:
        draw: of how near, and where in the cut the shape lies.
    """
    pixels = np.asarray(picture.convert("RGB")).astype(np.int16)
    ground = pixels[0, 0]
    apart = np.abs(pixels - ground).max(-1) > STANDS_OUT
    rows, columns = np.flatnonzero(apart.any(1)), np.flatnonzero(apart.any(0))
    if len(rows) == 0 or max(len(rows), len(columns)) < SMALLEST:
        return None
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    side = round(max(height, width) * draw.uniform(*AROUND))
    top = rows[0] - round(draw.uniform(0, side - height))
    left = columns[0] - round(draw.uniform(0, side - width))
    cut = Image.new("RGB", (side, side), tuple(int(value) for value in ground))
    cut.paste(picture.convert("RGB"), (-int(left), -int(top)))
    return cut.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)


def close_ups(paths: Iterable[Path], each: int, seed: int) -> tuple[Tensor, list[Path]]:
    """`each` cuts of every picture whose shape is large enough.

    Returns:
        `pictures × 3 × height × width`, float32 from -1 to 1, and the file that each is cut from.
    """
    draw = random.Random(seed)
    cuts: list[np.ndarray] = []
    origins: list[Path] = []
    for path in paths:
        picture = read_upright(path)
        for _ in range(each):
            cut = close_up(picture, draw)
            if cut is not None:
                cuts.append(np.asarray(cut))
                origins.append(path)
    return torch.from_numpy(np.stack(cuts)).permute(0, 3, 1, 2).float() / 127.5 - 1, origins
