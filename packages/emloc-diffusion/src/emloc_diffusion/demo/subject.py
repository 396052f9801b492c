"""The demo's new subject: a purple star with a yellow core, which the base model has never drawn.

And how like it a picture is. Published encoders (DINO, CLIP) see little in 32 pixels, so the measure is
plain: what stands out from the background is cut out, scaled to one size, and correlated with each picture
of the subject, treated the same. Place and size do not count; shape and colours do.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from emloc_diffusion.demo.small_stable_diffusion import PIXELS

SIDE = 16
STANDS_OUT = 0.25
"""Distance from the border's colour, of at most √3, from which a pixel belongs to the subject."""

MEASURE = (
    "fidelity: mean over drawn pictures of the highest correlation, at least 0, of their cut-out subject "
    f"({SIDE} × {SIDE} RGB, background grey) with that of a picture of the subject"
)

Pixels = NDArray[np.float64]


def draw_subject(folder: Path, count: int, seed: int) -> Path:
    """Pictures of the subject in several places and sizes, on nearly white ground."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    for index in range(count):
        radius = PIXELS * draw.uniform(0.27, 0.38)
        x, y = (draw.uniform(radius + 1, PIXELS - radius - 1) for _ in "xy")
        ground = tuple(draw.randint(232, 252) for _ in "rgb")
        picture = Image.new("RGB", (4 * PIXELS, 4 * PIXELS), ground)
        points = [
            (
                4 * (x + r * radius * math.sin(k * math.pi / 5)),
                4 * (y - r * radius * math.cos(k * math.pi / 5)),
            )
            for k, r in enumerate([1.0, 0.5] * 5)
        ]
        pen = ImageDraw.Draw(picture)
        pen.polygon(points, fill=(128, 0, 160))
        core = 4 * 0.33 * radius
        pen.ellipse((4 * x - core, 4 * y - core, 4 * x + core, 4 * y + core), fill=(250, 210, 0))
        picture.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS).save(folder / f"{index}.png")
    return folder


def fidelity(drawn: Sequence[Image.Image], subject: Sequence[Image.Image]) -> float:
    """See `MEASURE`; between 0 and 1."""
    references = [shape for shape in map(_cut_out, subject) if shape is not None]
    total = 0.0
    for picture in drawn:
        shape = _cut_out(picture)
        if shape is not None:
            total += max(0.0, max(_correlation(shape, one) for one in references))
    return total / len(drawn)


def _cut_out(picture: Image.Image) -> Pixels | None:
    """The pixels that stand out, `SIDE × SIDE × 3`, 0.5 where nothing does; None for an empty picture."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64) / 255
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    apart = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1) > STANDS_OUT
    rows, columns = np.flatnonzero(apart.any(1)), np.flatnonzero(apart.any(0))
    if len(rows) < 3 or len(columns) < 3:
        return None
    shown = np.where(apart[..., None], pixels, 0.5)
    part = shown[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scaled = Image.fromarray((part * 255).astype(np.uint8)).resize((SIDE, SIDE))
    return np.asarray(scaled, dtype=np.float64) / 255


def _correlation(a: Pixels, b: Pixels) -> float:
    """The correlation of what differs from grey."""
    a, b = a.ravel() - 0.5, b.ravel() - 0.5
    return float(a @ b / max(1e-12, np.linalg.norm(a) * np.linalg.norm(b)))
