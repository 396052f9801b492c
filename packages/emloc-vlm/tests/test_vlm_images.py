"""What a row may say of its image: read, or refused with file and line."""

import base64
import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from vlm_stage_options import visual_options

from emloc.errors import DataError
from emloc.integrations.pictures import read_picture
from emloc_vlm.images import ImageRef, image_source
from emloc_vlm.rows import load_examples, readable


@pytest.fixture
def folder(tmp_path):
    """`data/pictures/a.png`, turned and half transparent, with a secret beside `data`."""
    home = tmp_path / "data"
    (home / "pictures").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(home / "pictures/a.png", exif=exif)
    Image.new("RGB", (8, 9)).save(tmp_path / "secret.png")
    return home


def opened(source, folder):
    return np.asarray(ImageRef(image_source(source, folder, "t.jsonl, line 3"), "row").open())


def test_every_form_of_an_image_is_the_same_picture(folder):
    path = folder / "pictures/a.png"
    content = path.read_bytes()
    address = "data:image/png;base64," + base64.b64encode(content).decode()
    forms = ["pictures/a.png", str(path), path, content, bytearray(content), memoryview(content),
             Image.open(path), {"bytes": content, "path": "gone.png"}, {"path": "pictures/a.png"},
             {"bytes": None, "path": str(path)}, address, path.as_uri()]  # fmt: skip
    for form in forms:
        np.testing.assert_array_equal(
            opened(form, folder), np.asarray(read_picture(path, "x", "y"))
        )


@pytest.mark.parametrize("source", [
    True, 3, 1.5, float("nan"), [], ["a.png"], {}, {"bytes": None, "path": None}, {"bytes": "a.png"},
    {"url": "pictures/a.png"}, {"bytes": True, "path": "pictures/a.png"}, object, "", " ", "a\0b",
    {"path": ""}, {"path": 3}, "data:image/png;base64,%%%", "data:image/png,abc", "data:",
])  # fmt: skip
def test_what_is_no_image_is_refused_by_row(folder, source):
    with pytest.raises(DataError, match=r"^t\.jsonl, line 3") as problem:
        image_source(source, folder, "t.jsonl, line 3")
    assert str(problem.value).endswith(".")


@pytest.mark.parametrize("source", [
    "http://x/a.png", "HTTPS://x/a.png", "s3://b/a.png", "file://host/a.png", "hf://datasets/x/a.png",
    "zip://a.png::b.zip", "gs://x", {"path": "ftp://x/a.png", "bytes": None},
])  # fmt: skip
def test_addresses_are_refused(folder, source):
    with pytest.raises(DataError, match=r"t\.jsonl, line 3: the image .* is an address"):
        image_source(source, folder, "t.jsonl, line 3")


def test_paths_stay_in_the_folder(folder, tmp_path):
    secret = tmp_path / "secret.png"
    for name in (
        "../secret.png",
        str(secret),
        secret.as_uri(),
        "file:///etc/passwd",
        "pictures/../../secret.png",
    ):
        with pytest.raises(DataError, match=r"line 3: the image .* outside .*; set image_folder"):
            image_source(name, folder, "t.jsonl, line 3")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="link.png is a link that leads out of"):
        image_source("link.png", folder, "t.jsonl, line 3")
    (folder / "same.png").symlink_to("pictures/a.png")
    assert opened("same.png", folder).shape == (20, 12, 3)
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(DataError, match=r"pipe\.png is a pipe"):
        image_source("pipe.png", folder, "t.jsonl, line 3")
    assert image_source(str(tmp_path / "secret.png"), tmp_path, "x") == tmp_path / "secret.png"


def test_a_folder_by_another_name(folder, tmp_path, monkeypatch):
    (tmp_path / "other").symlink_to(folder)
    for name in (tmp_path / "other/pictures/a.png", folder / "pictures/a.png"):
        for home in (tmp_path / "other", folder):
            assert opened(str(name), home).shape == (20, 12, 3)
    monkeypatch.chdir(folder)
    assert opened(str(folder / "pictures/a.png"), folder.relative_to(folder)).shape == (20, 12, 3)


def rows(folder, *images):
    path = folder / "t.jsonl"
    lines = [json.dumps({"image": i, "question": "?", "answer": "x"}) for i in images]
    path.write_text("\n".join(lines))
    return path


def test_bad_images_are_governed_by_on_bad_image(folder, capsys):
    bomb = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(bomb, format="png")
    (folder / "bomb.png").write_bytes(bomb.getvalue())
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    path = rows(
        folder, "bomb.png", "pictures/a.png", "text.png", "empty.png", "folder.png", "gone.png"
    )
    options = visual_options(dataset=str(path), on_bad_image="skip")
    examples = load_examples(options, str(path))
    assert len(readable(examples, options)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "5 of 6 samples are skipped" in said
    assert "line 1" in said
    with pytest.raises(
        DataError, match=r"line 1: the image .*bomb\.png cannot be read \(.*pixels"
    ) as e:
        readable(examples, options.model_copy(update={"on_bad_image": "stop"}))
    assert "\n" not in str(e.value)
