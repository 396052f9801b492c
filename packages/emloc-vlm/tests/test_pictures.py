"""Every plugin reads a picture the same way: against numpy, and the libraries' own loaders."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from emloc.errors import DataError
from emloc.integrations.pictures import PIXEL_LIMIT, picture_suffixes, read_picture

WIDTH, HEIGHT = 40, 24


def noise(*channels, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, *channels), dtype=np.uint8)


def pixels(source):
    picture = read_picture(source, "the picture x", "replace it")
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def stock(path):
    return np.asarray(load_image(str(path))).astype(int)


def grey(values):
    return np.repeat(np.asarray(values, dtype=float)[..., None], 3, axis=2)


def on_white(colours, alpha):
    """Of 8 bits, alpha 255 opaque."""
    share = np.asarray(alpha, dtype=float)[..., None] / 255
    return np.asarray(colours, dtype=float) * share + 255 * (1 - share)


@pytest.mark.parametrize(
    "suffix", ["png", "bmp", "tif", "gif", "jpg", "jfif", "webp", "ppm", "tga"]
)
def test_plain_pictures_are_what_the_stock_loaders_read(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(3)).save(path)
    np.testing.assert_array_equal(pixels(path), stock(path))
    np.testing.assert_array_equal(pixels(path.read_bytes()), stock(path))
    np.testing.assert_array_equal(pixels(Image.open(path)), stock(path))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_turned_pictures(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(3)).save(path, exif=exif)
    found = pixels(path)
    assert found.shape == ((WIDTH, HEIGHT, 3) if orientation > 4 else (HEIGHT, WIDTH, 3))
    np.testing.assert_array_equal(found, stock(path))


@pytest.mark.parametrize("container", ["png", "tif", "pgm"])
def test_16_bits_of_grey_are_scaled(tmp_path, container):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    path = tmp_path / f"a.{container}"
    Image.fromarray(values).save(path)
    np.testing.assert_allclose(pixels(path), grey(values / 257), atol=0.501)
    assert len(np.unique(pixels(path))) == 256
    assert len(np.unique(stock(path))) < 8 or container == "pgm"  # why they are not followed here


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
def test_open_pictures_of_16_bits(mode):
    values = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    stored = {"I;16B": ">u2", "I": "<i4"}.get(mode, "<u2")
    picture = Image.frombytes(mode, (WIDTH, HEIGHT), values.astype(stored).tobytes())
    np.testing.assert_allclose(pixels(picture), grey(values / 257), atol=0.501)


def tiff(values, bits, photometric, order="<"):
    """A TIFF of one grey channel, by hand."""
    tags = [(256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, bits), (259, 3, 1),
            (262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0])]  # fmt: skip
    if bits == 12:
        flat = values.ravel()
        even, odd = flat[::2].astype(int), flat[1::2].astype(int)
        triples = np.stack([even >> 4, (even & 15) << 4 | odd >> 8, odd & 255], axis=1)
        data = triples.astype(np.uint8).tobytes()
    else:
        data = values.astype(f"{order}u2").tobytes()
    tags.append((279, 4, len(data)))
    entries = b""
    for tag, kind, value in sorted(tags):
        packed = struct.pack(
            f"{order}HH" if kind == 3 else f"{order}I", *([value, 0][: 3 - kind // 2])
        )
        entries += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    head = b"II*\0" if order == "<" else b"MM\0*"
    ifd = struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4
    return head + struct.pack(f"{order}I", 8 + len(data)) + data + ifd


def test_tiff_of_12_bits_and_of_white_at_zero():
    values = np.linspace(0, 4095, HEIGHT * WIDTH).round().astype(np.uint16).reshape(HEIGHT, WIDTH)
    np.testing.assert_allclose(pixels(tiff(values, 12, 1)), grey(values / 4095 * 255), atol=0.501)
    deep = values.astype(int) * 16
    np.testing.assert_allclose(pixels(tiff(deep, 16, 1)), grey(deep / 257), atol=0.501)
    np.testing.assert_allclose(pixels(tiff(deep, 16, 1, ">")), grey(deep / 257), atol=0.501)
    np.testing.assert_allclose(pixels(tiff(deep, 16, 0)), grey(255 - deep / 257), atol=0.501)


def test_grey_without_an_agreed_range_is_refused(tmp_path):
    ramp = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    for name, values in {"float.tif": ramp.astype(np.float32) / ramp.size,
                         "wide.tif": ramp.astype(np.int32)}.items():  # fmt: skip
        Image.fromarray(values).save(tmp_path / name)
        with pytest.raises(DataError, match=r"grey values are .*, whose range is not defined"):
            pixels(tmp_path / name)
    with pytest.raises(DataError, match="are outside the range from 0 to 65535"):
        pixels(Image.fromarray(np.full((3, 5), 70000, dtype=np.int32)))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif", "tga"])
def test_transparent_becomes_white_by_its_share(tmp_path, suffix):
    image = noise(4)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(image).save(
        path, **({"lossless": True, "exact": True} if suffix == "webp" else {})
    )
    np.testing.assert_allclose(pixels(path), on_white(image[..., :3], image[..., 3]), atol=1)


def test_transparency_of_grey_palettes_and_single_colours(tmp_path):
    image = noise(2)
    Image.fromarray(image, "LA").save(tmp_path / "la.png")
    np.testing.assert_allclose(
        pixels(tmp_path / "la.png"), on_white(grey(image[..., 0]), image[..., 1]), atol=1
    )
    indices = noise() % 4
    palette = np.array([[250, 10, 20], [0, 200, 0], [7, 8, 9], [90, 80, 255]])
    alphas = np.array([255, 0, 128, 30])
    picture = Image.fromarray(indices, "P")
    picture.putpalette(palette.astype(np.uint8).tobytes())
    picture.save(tmp_path / "p.png", transparency=alphas.astype(np.uint8).tobytes())
    np.testing.assert_allclose(
        pixels(tmp_path / "p.png"), on_white(palette[indices], alphas[indices]), atol=1
    )
    picture.save(tmp_path / "one.gif", transparency=2)
    expected = on_white(palette[indices], np.where(indices == 2, 0, 255))
    np.testing.assert_allclose(pixels(tmp_path / "one.gif"), expected, atol=1)
    colours = noise(3) // 128 * 255
    Image.fromarray(colours).save(tmp_path / "rgb.png", transparency=(255, 0, 0))
    clear = (colours == (255, 0, 0)).all(-1)
    np.testing.assert_array_equal(
        pixels(tmp_path / "rgb.png"), on_white(colours, np.where(clear, 0, 255))
    )
    deep = (noise().astype(np.uint16) // 64) * 16000
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=16000)
    expected = on_white(grey(np.round(deep / 257)), np.where(deep == 16000, 0, 255))
    np.testing.assert_array_equal(pixels(tmp_path / "deep.png"), expected)


def test_print_colours_and_bits(tmp_path):
    Image.fromarray(noise(4), "CMYK").save(tmp_path / "print.tif")
    Image.fromarray(noise(4), "CMYK").save(tmp_path / "print.jpg")
    Image.fromarray(noise() > 99).save(tmp_path / "bits.png")
    for name in ("print.tif", "print.jpg", "bits.png"):
        np.testing.assert_array_equal(pixels(tmp_path / name), stock(tmp_path / name))
    cmyk = np.asarray(Image.open(tmp_path / "print.tif")).astype(float)
    expected = (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255
    np.testing.assert_allclose(pixels(tmp_path / "print.tif"), expected, atol=1.5)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_the_first_picture_of_several_counts(tmp_path, suffix):
    first, second = (Image.fromarray(np.full((24, 40, 3), v, np.uint8)) for v in (40, 200))
    path = tmp_path / f"a.{suffix}"
    first.save(
        path, save_all=True, append_images=[second], **({} if suffix == "tif" else {"duration": 9})
    )
    np.testing.assert_allclose(pixels(path), 40, atol=3)


def png(width, height, data=b""):
    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("size", "reason"), [
    ((100_000, 100_000), "10000000000 pixels"),
    ((13_378, 13_378), "13378 × 13378 pixels|178970884 pixels"),
    ((0, 5), "its format is not supported|no pixels"),
])  # fmt: skip
def test_pictures_too_large_and_of_no_size(size, reason):
    with pytest.raises(DataError, match=reason) as problem:
        read_picture(png(*size), "rows.jsonl, line 3: the image a.png", "pass on_bad_image=skip")
    assert str(problem.value).startswith("rows.jsonl, line 3: the image a.png cannot be read (")
    assert str(problem.value).endswith("); pass on_bad_image=skip.")
    assert "\n" not in str(problem.value)


def test_large_pictures_are_read_without_a_warning(monkeypatch, recwarn):
    assert Image.MAX_IMAGE_PIXELS < PIXEL_LIMIT < 2 * Image.MAX_IMAGE_PIXELS  # Pillow's own refusal
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert pixels(png(40, 25, (b"\0" + b"\x07" * 120) * 25)).shape == (25, 40, 3)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif"])
def test_damaged_pictures_are_refused_in_one_sentence(tmp_path, suffix):
    whole = io.BytesIO()
    formats = {"jpg": "jpeg", "tif": "tiff"}
    Image.fromarray(noise(3)).save(whole, format=formats.get(suffix, suffix))
    content = whole.getvalue()
    for broken in (
        content[: len(content) // 2],
        content[:20],
        b"",
        b"\0" * 400,
        b"%!PS-Adobe-3.0 EPSF",
    ):
        with pytest.raises(DataError, match=r"^the picture x cannot be read \(.*\); replace it\.$"):
            pixels(broken)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, on what it goes on with
def test_no_damage_leaves_a_traceback(tmp_path):
    draw = np.random.default_rng(0)
    for suffix in ("png", "jpeg", "webp", "tiff", "gif"):
        whole = io.BytesIO()
        Image.fromarray(noise(4 if suffix == "png" else 3)).save(whole, format=suffix)
        for _ in range(40):
            content = bytearray(whole.getvalue())
            for place in draw.integers(0, len(content), 12):
                content[place] = draw.integers(0, 256)
            try:
                pixels(bytes(content))
            except DataError as problem:
                assert "\n" not in str(problem)  # noqa: PT017


def test_special_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png is a pipe, not a file"):
        read_picture(tmp_path / "pipe.png", "x", "y")
    with pytest.raises(FileNotFoundError):
        read_picture(tmp_path / "gone.png", "x", "y")
    with pytest.raises(DataError, match="directory"):
        read_picture(tmp_path, "x", "y")


def test_what_other_programs_would_read_is_not_read():
    assert {".png", ".jpg", ".jfif", ".gif", ".tif", ".webp", ".bmp"} <= picture_suffixes()
    assert not {".eps", ".ps", ".pdf", ".wmf", ".mpg", ".h5"} & picture_suffixes()
