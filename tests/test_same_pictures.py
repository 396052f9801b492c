"""The same file is the same pixels to every family that reads pictures."""

import numpy as np
import pytest
from PIL import Image

from emloc_diffusion.data.images import read_upright
from emloc_vlm.images import ImageRef

RAMP = np.linspace(0, 1, 256)[None].repeat(64, 0)


def photo(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((RAMP * 255).astype(np.uint8)).convert("RGB").save(path, exif=exif)


def logo(path):
    pixels = np.zeros((40, 32, 4), np.uint8)
    pixels[8:24, 8:24, 3] = 255
    Image.fromarray(pixels).save(path)


def deep(path):
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(path)


@pytest.mark.parametrize(
    ("write", "name", "shape", "levels"),
    [
        (photo, "a.jpg", (256, 64, 3), 192),
        (logo, "a.png", (40, 32, 3), 2),
        (deep, "a.png", (64, 256, 3), 256),
        (deep, "a.tif", (64, 256, 3), 256),
    ],
)
def test_vlm_and_diffusion_read_alike(tmp_path, write, name, shape, levels):
    write(tmp_path / name)
    ours = [
        np.asarray(i)
        for i in (ImageRef(tmp_path / name, "row").open(), read_upright(tmp_path / name))
    ]
    np.testing.assert_array_equal(*ours)
    assert ours[0].shape == shape
    assert abs(len(np.unique(ours[0])) - levels) < 10
