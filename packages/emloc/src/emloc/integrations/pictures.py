"""One way from a picture file to RGB pixels, for every plugin that reads pictures.

Pillow's `convert("RGB")` alone is silently wrong for much of what people have: it clips 16 bits of grey
to white, leaves phone photographs on their side, and shows whatever colour lies under transparency. Here
a picture is turned as its EXIF says, 16 bits become 8 by value / 257, and what is transparent becomes
white, half of it half. Of animations and files of several pages the first picture counts. Colour profiles
are not applied, as no loader of transformers or diffusers does.

What has no agreed range of grey (32-bit integers, floats) is refused, and so are pictures of more than
`PIXEL_LIMIT` pixels, which fill the memory for nothing.
"""

import io
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from emloc.errors import DataError
from emloc.machine.special_files import refuse_special

PIXEL_LIMIT = 1 << 27
"""Most pixels of a picture: 384 MiB in RGB, more than a camera of 100 megapixels makes."""

NOT_READ = frozenset({"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"})
"""Formats that Pillow knows and hands to other programs, such as Ghostscript, or cannot decode."""

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def read_picture(source: Path | bytes | Image.Image, name: str, hint: str) -> Image.Image:
    """The decoded picture, upright, in RGB.

    Args:
        source: a file, the content of one, or an open picture, which stays as it is.
        name: what the message calls it: `FILE, line 3: the image a.png`.
        hint: what the message says to do.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: it is no picture, damaged, in a format that is not read, without pixels, or of more than
            `PIXEL_LIMIT`; or a pipe or device, which is not opened.
    """
    if isinstance(source, Path):
        refuse_special(source, DataError)
    try:
        with warnings.catch_warnings():  # the limit is ours, and nothing to warn of below it
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            if isinstance(source, Image.Image):
                return upright_rgb(source)
            content = source if isinstance(source, Path) else io.BytesIO(source)
            with Image.open(content, formats=sorted(_formats())) as opened:
                return upright_rgb(opened)
    except (FileNotFoundError, MemoryError):
        raise
    except UnidentifiedImageError as problem:
        raise DataError(
            f"{name} cannot be read (its format is not supported); {hint}."
        ) from problem
    except Exception as problem:  # decoders of damaged files raise nearly anything
        said = str(getattr(problem, "strerror", None) or problem).strip() or type(problem).__name__
        reason = said.splitlines()[0].rstrip(".")
        raise DataError(f"{name} cannot be read ({reason}); {hint}.") from problem


def upright_rgb(picture: Image.Image) -> Image.Image:
    """An open picture in RGB: turned as its EXIF says, 16 bits scaled, on white.

    Raises:
        ValueError: it has no pixels or too many, or no agreed range of grey.
        OSError, SyntaxError: Pillow cannot decode it.
    """
    width, height = picture.size
    if width * height > PIXEL_LIMIT:
        raise ValueError(f"it has {width} × {height} pixels, more than {PIXEL_LIMIT:,}")
    if width * height == 0:
        raise ValueError("it has no pixels")
    picture.load()
    scale = _grey_scale(picture)
    picture = ImageOps.exif_transpose(picture)
    if scale is not None:
        picture = _as_8_bits(picture, *scale)
    if picture.has_transparency_data:
        over = picture.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        picture = Image.alpha_composite(white, over)
    return picture.convert("RGB")


@cache
def picture_suffixes() -> frozenset[str]:
    """Ends of file names, in lower case, of the formats that are read: `.png`, `.tif`, …"""
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in _formats()
    )


@cache
def _formats() -> frozenset[str]:
    Image.init()
    return frozenset(Image.OPEN) - NOT_READ


def _grey_scale(picture: Image.Image) -> tuple[int, bool] | None:
    """The value that is white (or black, if so) in a grey picture of more than 8 bits; None for others."""
    mode = picture.mode
    if mode.startswith("I;16"):
        tags: Any = getattr(picture, "tag_v2", {})  # of TIFF alone
        bits = int((*tags.get(_BITS_PER_SAMPLE, ()), 16)[0])
        # Pillow turns pictures whose white is zero round where they have 8 bits, and not these.
        return (1 << bits) - 1, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    # Pillow before 11 opens 16-bit PNG in this mode; PGM it scales to 16 bits.
    if mode == "I" and picture.format in ("PNG", "PPM", None):
        return 0xFFFF, False
    if mode in ("I", "F"):
        kind = "32-bit or signed integers" if mode == "I" else "floating-point numbers"
        raise ValueError(
            f"its grey values are {kind}, whose range is not defined; save 8 or 16 bits"
        )
    return None


def _as_8_bits(picture: Image.Image, white: int, inverted: bool) -> Image.Image:
    """Grey of 8 bits, with alpha where one value is transparent."""
    values = np.asarray(picture).astype(np.float64)
    if values.min() < 0 or values.max() > white:
        raise ValueError(f"its grey values are outside the range from 0 to {white}")
    grey = np.round(values * (255.0 / white)).astype(np.uint8)
    scaled = Image.fromarray(255 - grey if inverted else grey)
    clear = picture.info.get("transparency")
    if isinstance(clear, int):
        scaled.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return scaled
