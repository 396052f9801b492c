"""The demo's base model: what it is told of the pictures, what is saved, and what is kept."""

import json
import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from emloc.demos.easy_vqa import COLORS, SHAPES, Question
from emloc_diffusion.demo import base
from emloc_diffusion.demo.base import Recipe, trained_base
from emloc_diffusion.demo.captions import VOCABULARY, caption, described
from emloc_diffusion.demo.pictures import close_up, close_ups
from emloc_diffusion.demo.small_stable_diffusion import PIXELS, TOKENS, Shape, small_pipeline
from emloc_diffusion.demo.subject import draw_subject, fidelity

SMALL = Shape(vae_widths=(8, 8, 16), widths=(16, 24), text_width=16, text_layers=1)


@pytest.fixture(scope="module")
def folder():
    return trained_base(Recipe(SMALL, cuts=1, vae_steps=4, steps=4, batch=8))


def test_only_pictures_of_known_shape_and_color_are_described(tmp_path):
    whole, no_color, denied = (tmp_path / f"{name}.png" for name in ("whole", "shape", "denied"))
    asked = [
        Question("what shape is this?", "circle", whole),
        Question("is there a red shape?", "yes", whole),
        Question("is there no triangle?", "no", no_color),
        Question("is there a circle in the image?", "yes", denied),
        Question("is there a red shape?", "no", denied),
    ]
    assert described(asked) == {whole: ("circle", "red")}
    assert caption("circle", "red") == "a red circle"
    assert (caption("circle"), caption(color="red"), caption()) == ("a circle", "a red shape", "")


def picture_with(box, path):
    picture = Image.new("RGB", (64, 64), "#f0f4ff")
    ImageDraw.Draw(picture).rectangle(box, fill="red")
    picture.save(path)
    return path


def test_a_close_up_holds_the_whole_shape_large(tmp_path):
    path = picture_with((40, 3, 59, 12), tmp_path / "wide.png")
    for seed in range(20):
        cut = close_up(Image.open(path), random.Random(seed))
        red = np.abs(np.asarray(cut).astype(int) - (255, 0, 0)).max(-1) < 60
        assert cut.size == (PIXELS, PIXELS)
        # 20 by 10 pixels in a square of 1.35 to 1.9 times the longer side.
        assert 0.08 <= red.mean() <= 0.34
        rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
        assert len(columns) / len(rows) == pytest.approx(2, rel=0.3)


def test_shapes_of_few_pixels_are_left_out(tmp_path):
    large = picture_with((10, 10, 40, 40), tmp_path / "large.png")
    small = picture_with((10, 10, 18, 18), tmp_path / "small.png")
    empty = picture_with((70, 70, 80, 80), tmp_path / "empty.png")
    pictures, origins = close_ups([small, large, empty], 3, seed=0)
    assert origins == [large] * 3
    assert pictures.shape == (3, 3, PIXELS, PIXELS)
    assert float(pictures.min()) < -0.9 < 0.8 < float(pictures.max())
    assert torch.equal(pictures, close_ups([large], 3, seed=0)[0])


def test_known_words_are_one_token_and_any_other_is_spelt():
    tokenizer = small_pipeline(SMALL, VOCABULARY).tokenizer
    for word in VOCABULARY:
        assert tokenizer.tokenize(f"a {word}") == ["a</w>", f"{word}</w>"]
    spelt = tokenizer.tokenize("Zebra 7")
    assert "".join(spelt).replace("</w>", " ").strip() == "zebra 7"
    assert tokenizer.unk_token not in spelt or tokenizer.unk_token == tokenizer.eos_token


def test_it_is_a_stock_pipeline_that_draws(folder):
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.safety_checker is None
    assert pipeline.tokenizer.model_max_length == TOKENS
    # Scaled latents have the spread of the noise that is added to them.
    assert pipeline.vae.config.scaling_factor != type(pipeline.vae)().config.scaling_factor
    names = dict(pipeline.unet.named_modules())
    assert any(name.endswith("attn2.to_k") for name in names)
    assert any(getattr(module, "kernel_size", None) == (3, 3) for module in names.values())
    drawn = pipeline(
        ["a red circle", "a sks zebra"], num_inference_steps=2, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images  # fmt: skip
    assert drawn.shape == (2, PIXELS, PIXELS, 3)
    assert (drawn[0] != drawn[1]).any()


def test_its_files_hold_no_pickle(folder):
    ends = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert ends <= {".json", ".safetensors", ".txt"}
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_it_is_trained_once(folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("trained again")

    before = torch.random.get_rng_state()
    monkeypatch.setattr(base, "_train", refuse)
    assert trained_base(Recipe(SMALL, cuts=1, vae_steps=4, steps=4, batch=8)) == folder
    with pytest.raises(AssertionError, match="trained again"):
        trained_base(Recipe(SMALL, cuts=1, vae_steps=4, steps=4, batch=8, seed=1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_shape_and_color_is_known():
    assert {*SHAPES, *COLORS, "sks"} <= set(VOCABULARY)


def test_fidelity_is_of_shape_and_colors_and_not_of_place_and_size(tmp_path):
    folder = draw_subject(tmp_path / "subject", 4, seed=0)
    subject = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    others = draw_subject(tmp_path / "others", 4, seed=1)
    alike = [Image.open(path) for path in sorted(others.glob("*.png"))]
    square = Image.open(picture_with((10, 10, 40, 40), tmp_path / "square.png"))
    red = [Image.fromarray(np.asarray(picture)[..., [1, 2, 0]]) for picture in alike]
    blank = Image.new("RGB", (PIXELS, PIXELS), "white")
    assert fidelity(subject, subject) == pytest.approx(1.0)
    assert fidelity(alike, subject) > 0.85
    assert fidelity(red, subject) < 0.7 * fidelity(alike, subject)
    assert fidelity([square], subject) < 0.5
    assert fidelity([blank], subject) == 0
    assert fidelity([*subject, blank], subject) == pytest.approx(0.8)
