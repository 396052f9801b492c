"""The demo's base model: what it is told of the pictures, what is saved, and what is kept."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

from emloc.demos.easy_vqa import COLORS, SHAPES, Question
from emloc_diffusion.demo import base
from emloc_diffusion.demo.base import Recipe, trained_base
from emloc_diffusion.demo.captions import VOCABULARY, caption, described
from emloc_diffusion.demo.small_stable_diffusion import TOKENS, Shape, small_pipeline

SMALL = Shape(vae_widths=(8, 8, 8, 16), widths=(16, 24), text_width=16, text_layers=1)


@pytest.fixture(scope="module")
def folder():
    return trained_base(Recipe(SMALL, vae_steps=4, steps=4, batch=8))


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
    assert drawn.shape == (2, 64, 64, 3)
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
    assert trained_base(Recipe(SMALL, vae_steps=4, steps=4, batch=8)) == folder
    with pytest.raises(AssertionError, match="trained again"):
        trained_base(Recipe(SMALL, vae_steps=4, steps=4, batch=8, seed=1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_every_shape_and_color_is_known():
    assert {*SHAPES, *COLORS, "sks"} <= set(VOCABULARY)
