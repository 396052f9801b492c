"""Folders of pictures, their captions, and the squares that are cut from them."""

import os
import random

import numpy as np
import pytest
import torch
from diffusers.utils import load_image
from PIL import Image, features

from emloc.errors import ConfigError, DataError
from emloc_diffusion.data.images import Picture, load_pictures, open_picture
from emloc_diffusion.data.prompts import check_unique_token
from emloc_diffusion.example_pipelines import clip_tokenizer


def painted(path, size=(80, 60), seed=0, **more):
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **more)
    return path


@pytest.fixture
def dog(tmp_path):
    """Three pictures, a hidden one, and files that are none."""
    folder = tmp_path / "dog"
    for number, name in enumerate(["b.png", "A.JPG", "c.webp"]):
        painted(folder / name, seed=number)
    painted(folder / ".hidden.png")
    (folder / "notes.md").write_text("no picture")
    (folder / "more.png").mkdir()
    return folder


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def message(problem):
    """It is one sentence, on one line."""
    text = str(problem.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def test_one_prompt_for_all(dog, capsys):
    pictures = load_pictures(dog, "a photo of sks dog")
    assert [picture.path.name for picture in pictures] == ["A.JPG", "b.png", "c.webp"]
    assert {picture.caption for picture in pictures} == {"a photo of sks dog"}
    assert not any(picture.is_prior for picture in pictures)


def test_what_is_not_read_is_counted_and_named(dog, capsys):
    for name in ("b.txt", "A.txt"):
        (dog / name).write_text("a caption")
    load_pictures(dog, "a photo of sks dog")
    text = said(capsys)
    assert text.count("warning") == 1
    assert "5 of 8 files in" in text
    assert (
        "2 captions (one prompt is given for all), 1 folder, 1 .md, 1 hidden: A.txt, b.txt, mor"
        in text
    )
    (dog / "c.txt").write_text("a caption")
    (dog / "orphan.txt").write_text("a caption")
    (dog / "metadata.jsonl").touch()
    (dog / ".DS_Store").touch()
    load_pictures(dog)
    text = said(capsys)
    assert "5 of 8 files in" in text
    assert "1 .jsonl" in text
    assert "1 .txt" in text
    load_pictures(dog, "sks dog", clean(dog, "class"), "dog")
    assert said(capsys).count("are not read") == 1


def clean(dog, name):
    """A folder of the pictures alone."""
    for number, file in enumerate(["b.png", "A.JPG", "c.webp"]):
        painted(dog.parent / name / file, seed=number)
    return dog.parent / name


@pytest.mark.parametrize(
    "suffix", ["gif", "tif", "tiff", "jfif", "jpe", "ppm", "tga", "apng", "avif"]
)
def test_whatever_pillow_reads_is_a_picture(tmp_path, suffix, capsys):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    for number in range(3):
        painted(tmp_path / "dog" / f"{number}.{suffix}", seed=number)
    squares = [open_picture(p, 48).pixels for p in load_pictures(tmp_path / "dog", "sks")]
    assert len(squares) == 3
    assert said(capsys) == ""
    expected = load_image(str(tmp_path / f"dog/0.{suffix}")).resize(
        (64, 48), Image.Resampling.LANCZOS
    )
    expected = torch.from_numpy(np.asarray(expected, dtype=np.float32)[:, 8:56] / 127.5 - 1)
    torch.testing.assert_close(squares[0], expected.permute(2, 0, 1))


def test_links_stay_in_the_folder(dog, tmp_path):
    (dog / "d.png").symlink_to("b.png")
    assert len(load_pictures(dog, "sks")) == 4
    painted(tmp_path / "elsewhere.png")
    (dog / "e.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(DataError, match=r"e\.png is a link that leads out of"):
        load_pictures(dog, "sks")
    (dog / "e.png").unlink()
    (tmp_path / "secret").write_text("a secret")
    for name in "Abcd":
        (dog / f"{name}.txt").write_text("a dog")
    (dog / "c.txt").unlink()
    (dog / "c.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"c\.txt is a link that leads out of"):
        load_pictures(dog)


def test_pipes_are_not_opened(dog):
    os.mkfifo(dog / "e.png")
    with pytest.raises(DataError, match=r"e\.png is a pipe, not a file"):
        load_pictures(dog, "sks")
    (dog / "e.png").unlink()
    os.mkfifo(dog / "b.txt")
    with pytest.raises(DataError, match=r"b\.txt is a pipe, not a file|A\.txt is missing"):
        load_pictures(dog)


def test_a_strip_that_no_square_can_be_cut_from(tmp_path):
    painted(tmp_path / "a.png", size=(4000, 1))
    with pytest.raises(DataError, match=r"a\.png: the picture is 4000 × 1, too narrow") as problem:
        open_picture(Picture(tmp_path / "a.png", ""), 512)
    message(problem)


def test_captions_beside_the_pictures(dog):
    for name in "Abc":
        (dog / f"{name}.txt").write_text(f"\ufeffcaption of\n {name}, é \n", encoding="utf-8")
    captions = [picture.caption for picture in load_pictures(dog)]
    assert captions == ["caption of A, é", "caption of b, é", "caption of c, é"]
    (dog / "b.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"b\.txt: .* UTF-8"):
        load_pictures(dog)
    (dog / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.txt is missing") as problem:
        load_pictures(dog)
    assert "b.png" in message(problem)


def test_an_empty_caption_is_said(dog, capsys):
    for name in "Abc":
        (dog / f"{name}.txt").write_text("" if name == "b" else "dog")
    load_pictures(dog)
    assert "1 captions are empty: b.png" in said(capsys)


def test_pictures_of_the_class(dog, tmp_path):
    for number in range(2):
        painted(tmp_path / "class" / f"{number}.bmp", seed=number)
    pictures = load_pictures(dog, "sks dog", tmp_path / "class", "dog")
    assert [(picture.caption, picture.is_prior) for picture in pictures] == [
        *[("sks dog", False)] * 3,
        *[("dog", True)] * 2,
    ]
    with pytest.raises(ConfigError, match="class_data_dir is set without class_prompt") as problem:
        load_pictures(dog, "sks dog", class_data_dir=tmp_path / "class")
    message(problem)
    with pytest.raises(ConfigError, match="class_prompt is set without class_data_dir"):
        load_pictures(dog, "sks dog", class_prompt="dog")
    with pytest.raises(ConfigError, match="other than the subject's"):
        load_pictures(dog, "sks dog", dog, "dog")
    with pytest.raises(DataError, match="class_data_dir: there is no folder"):
        load_pictures(dog, "sks dog", tmp_path / "cat", "dog")


def test_bad_folders(dog, tmp_path):
    with pytest.raises(DataError, match="instance_data_dir: there is no folder") as problem:
        load_pictures(tmp_path / "cat", "sks")
    message(problem)
    with pytest.raises(DataError, match="there is no folder"):
        load_pictures(dog / "b.png", "sks")
    (tmp_path / "empty").mkdir()
    painted(tmp_path / "empty" / ".hidden.png")
    with pytest.raises(DataError, match="is empty") as problem:
        load_pictures(tmp_path / "empty", "sks")
    message(problem)
    (tmp_path / "empty" / "a.heic").touch()
    with pytest.raises(DataError, match=r"has no pictures, only a\.heic; .*png, jpg") as problem:
        load_pictures(tmp_path / "empty", "sks")
    message(problem)


@pytest.mark.parametrize("content", [b"", b"no picture", "cut"])
def test_a_broken_picture_is_named(dog, content):
    if content == "cut":
        content = (dog / "A.JPG").read_bytes()[:900]
    (dog / "broken.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.jpg: the picture cannot be read") as problem:
        load_pictures(dog, "sks")
    message(problem)


def test_few_small_and_mixed_pictures_are_said(dog, tmp_path, capsys):
    dog = clean(dog, "clean")
    load_pictures(dog, "sks", resolution=60)
    assert said(capsys) == ""
    load_pictures(dog, "sks", resolution=64)
    text = said(capsys)
    assert "A.JPG is 80 × 60 (and 2 more), 4 pixels short of resolution=64" in text
    assert "sizes" not in text
    painted(dog / "d.png", size=(40, 90))
    painted(dog / "e.png", size=(70, 90))
    load_pictures(dog, "sks", resolution=64)
    text = said(capsys)
    assert "d.png is 40 × 90 (and 3 more), 24 pixels short" in text
    assert text.count("the pictures have 3 different sizes") == 1
    painted(tmp_path / "[one]" / "only.png")
    load_pictures(tmp_path / "[one]", "sks")
    assert "has only 1 picture; three" in said(capsys)


def test_a_picture_of_the_size_is_taken_as_it_is(tmp_path):
    path = painted(tmp_path / "a.png", size=(64, 64))
    square = open_picture(Picture(path, ""), 64)
    expected = torch.tensor(np.asarray(Image.open(path)).copy()).permute(2, 0, 1) / 127.5 - 1
    assert square.pixels.shape == (3, 64, 64)
    assert square.pixels.dtype == torch.float32
    assert square.pixels.is_contiguous()
    torch.testing.assert_close(square.pixels, expected)
    assert (square.original_size, square.crop_top_left) == ((64, 64), (0, 0))


@pytest.mark.parametrize("size", [(90, 61), (61, 90), (20, 31), (500, 64)])
def test_resized_by_the_shorter_side_and_cut(tmp_path, size):
    path = painted(tmp_path / "a.png", size=size)
    square = open_picture(Picture(path, ""), 48)
    assert square.pixels.shape == (3, 48, 48)
    assert square.pixels.abs().max() <= 1
    assert square.original_size == (size[1], size[0])
    long = round(max(size) * 48 / min(size))
    middle = ((long - 48) // 2, 0) if size[1] > size[0] else (0, (long - 48) // 2)
    assert square.crop_top_left == middle
    resized = (long, 48) if size[0] > size[1] else (48, long)
    with Image.open(path) as image:
        pixels = np.asarray(image.resize(resized, Image.Resampling.LANCZOS), dtype=np.float32)
    top, left = square.crop_top_left
    expected = torch.from_numpy(pixels[top : top + 48, left : left + 48] / 127.5 - 1)
    torch.testing.assert_close(square.pixels, expected.permute(2, 0, 1))


def test_random_crop_and_flip(tmp_path):
    picture = Picture(painted(tmp_path / "a.png", size=(96, 48)), "")
    center = open_picture(picture, 48)
    draw = random.Random(0)
    cuts = [open_picture(picture, 48, center_crop=False, generator=draw) for _ in range(12)]
    assert len({cut.crop_top_left for cut in cuts}) > 5
    assert all(cut.crop_top_left[0] == 0 <= cut.crop_top_left[1] <= 48 for cut in cuts)
    flips = [open_picture(picture, 48, random_flip=True, generator=draw).pixels for _ in range(12)]
    mirrored = center.pixels.flip(-1)
    assert {(torch.equal(f, center.pixels), torch.equal(f, mirrored)) for f in flips} == {
        (True, False),
        (False, True),
    }
    one, other = (open_picture(picture, 48, False, True, random.Random(5)).pixels for _ in range(2))
    assert torch.equal(one, other)


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    path = painted(tmp_path / "a.png", size=(64, 48), exif=exif)
    square = open_picture(Picture(path, ""), 48)
    assert square.original_size == (64, 48)
    with Image.open(path) as image:
        upright = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    expected = torch.from_numpy(np.asarray(upright, dtype=np.float32)[8:56] / 127.5 - 1)
    torch.testing.assert_close(square.pixels, expected.permute(2, 0, 1))


def test_transparent_becomes_white(tmp_path):
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 8))
    for name, mode in (("rgba", "RGBA"), ("palette", "P"), ("grey", "LA")):
        path = tmp_path / f"{name}.png"
        image.convert(mode).save(path)
        pixels = open_picture(Picture(path, ""), 16).pixels
        assert (pixels[:, 8:] == 1).all(), name
        assert (pixels[0, :8] < -0.5).all(), name
    half = Image.new("RGBA", (16, 16), (0, 0, 0, 51))
    half.save(tmp_path / "half.png")
    pixels = open_picture(Picture(tmp_path / "half.png", ""), 16).pixels
    torch.testing.assert_close(pixels, torch.full((3, 16, 16), 0.6), atol=0.01, rtol=0)


def test_other_modes(tmp_path):
    grey = np.full((16, 16), 0x8080, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    Image.new("L", (16, 16), 128).save(tmp_path / "grey.jpg")
    Image.new("CMYK", (16, 16), (0, 0, 0, 127)).save(tmp_path / "print.jpg")
    Image.new("1", (16, 16), 1).save(tmp_path / "bits.bmp")
    for name, value in {"deep.png": 0, "grey.jpg": 0, "print.jpg": 0, "bits.bmp": 1}.items():
        pixels = open_picture(Picture(tmp_path / name, ""), 16).pixels
        torch.testing.assert_close(pixels, torch.full((3, 16, 16), float(value)), atol=0.02, rtol=0)


def test_a_picture_that_went_away(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: this picture no longer exists"):
        open_picture(Picture(tmp_path / "gone.png", ""), 16)


def test_a_unique_token(capsys):
    assert check_unique_token("a photo of sks dog", "a photo of dog") == ("sks",)
    assert check_unique_token("a <cat-toy> in [V] style", "a toy") == ("<cat-toy>", "[v]")
    assert check_unique_token("A photo of a dog") == ("dog",)  # cannot be known without more
    with pytest.raises(ConfigError, match="are the same .*'A photo of sks dog'") as problem:
        check_unique_token("A photo of dog", "a  photo of Dog.")
    message(problem)
    with pytest.raises(ConfigError, match="no word of its own") as problem:
        check_unique_token("a picture of my dog", "a photo of dog")
    message(problem)
    for prompt in ("", "a photo of the"):
        with pytest.raises(ConfigError, match="no word of its own"):
            check_unique_token(prompt)
    assert said(capsys) == ""


def test_a_tokenizer_tells_everyday_words(capsys):
    # As in a real vocabulary, what was merged first is frequent.
    tokenizer = clip_tokenizer(
        words=["dog", *(f"{a}{b}" for a in "bcdfgh" for b in "aeiou"), "sks"]
    )
    tokenizer_size = len(tokenizer)

    class Frequent:
        """The tokenizer with `dog` early, as byte tokens fill most of so small a vocabulary."""

        def __len__(self):
            return tokenizer_size

        def __call__(self, word, **more):
            ids = tokenizer(word, **more)["input_ids"]
            return {"input_ids": [5] if word == "dog" else ids}

    for prompt in ("a photo of sks dog", "a photo of zwx dog"):
        check_unique_token(prompt, None, Frequent())
    assert said(capsys) == ""
    check_unique_token("a photo of dog", None, Frequent())
    assert "everyday" in said(capsys)
