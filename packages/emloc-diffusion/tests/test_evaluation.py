"""`emloc evaluate` on a pipeline: drawn pictures, DreamBooth's scores of them, and the contact sheet."""

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_encoders import write_clip, write_dino

import emloc
from emloc.adapters.rounding import Rounding
from emloc.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DependencyError,
    MismatchError,
    OutputError,
)
from emloc_diffusion import album, evaluated_pictures
from emloc_diffusion.drawing import contact_sheet_png, load_pipeline, with_lora
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import RESOLUTION, write_pipeline
from emloc_diffusion.export import DIFFUSERS_NAME, export_adapter
from emloc_diffusion.scoring import (
    evaluation_prompts,
    load_clip,
    load_dino,
    own_prompts,
    plain_prompts,
)

PROMPT = "a photo of sks square"
PROMPTS = ("a sks square in snow", "one red sks square", "sks square, wet")
PLAIN = ("a square in snow", "one red square", "square, wet")
SCORES = ("dino", "clip_i", "clip_t")
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["to_q", "to_v", "conv1"]


def lora(base, folder, text_encoder=False, component="unet", **options):
    """A LoRA of random numbers for a pipeline, large enough to change its pictures."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    parts = {component: (folder, UNET if component == "unet" else UNET[:2])}
    if text_encoder:
        parts["text_encoder"] = (folder / "text_encoder", CLIP)
    generator = torch.Generator().manual_seed(1)
    for name, (target, modules) in parts.items():
        config = LoraConfig(r=3, lora_alpha=7, target_modules=modules, **options)
        model = get_peft_model(getattr(pipeline, name), config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(target)
    export_adapter(folder, component)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluation")
    base = write_pipeline(root / "base", "sd", seed=1)
    (root / "prompts.txt").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n")
    pictures = write_pictures(root / "pictures", 3, seed=2)
    # One with nothing behind it, which counts as white, and one that is no square.
    clear = Image.new("RGBA", (80, 64), (200, 0, 0, 0))
    clear.paste((0, 0, 200, 255), (10, 10, 40, 40))
    clear.save(pictures / "clear.png")
    made = SimpleNamespace(
        root=root, base=base, pictures=pictures, prompts=root / "prompts.txt",
        dino=write_dino(root / "dino"), clip=write_clip(root / "clip"),
        plain=lora(base, root / "plain"),
        whole=lora(base, root / "whole", text_encoder=True, use_dora=True),
    )  # fmt: skip
    made.data = {
        "model_name_or_path": str(base), "dataset": str(pictures), "instance_prompt": PROMPT,
        "resolution": RESOLUTION, "num_noise_samples": 2,
    }  # fmt: skip
    made.drawing = {"num_inference_steps": 2, "num_images_per_prompt": 2, "drawing_seed": 5}
    made.scores = {
        **made.data, **made.drawing, "dino_model": str(made.dino), "clip_model": str(made.clip),
        "subject_token": "sks", "prompts_file": made.prompts, "adapter": str(made.plain),
    }  # fmt: skip
    made.found = emloc.evaluate(output_dir=root / "scored", **made.scores)
    return made


def cosine(one, other):
    return math.fsum(a * b for a, b in zip(one, other)) / (math.hypot(*one) * math.hypot(*other))


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def listed(folder):
    index = json.loads((folder / album.INDEX_NAME).read_text())
    return [(one["prompt"], one["seed"], folder / one["file"]) for one in index["pictures"]]


def opened(paths):
    return [Image.open(path).convert("RGB") for path in paths]


def stock(base, adapter, prompt, seed, **options):
    """What anybody would draw with diffusers alone."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        prompt, num_inference_steps=2, height=RESOLUTION, width=RESOLUTION, generator=generator,
        **options,
    ).images[0]  # fmt: skip


def test_scores_are_those_of_the_pictures_on_disk(made):
    """Pair by pair over the files that were written, all pictures of the subject among them."""
    drawn = listed(made.root / "scored" / "pictures" / "plain")
    assert [(prompt, seed) for prompt, seed, _ in drawn] == [
        (prompt, seed) for prompt in PROMPTS for seed in (5, 6)
    ]
    generated = opened(path for *_, path in drawn)
    real = []
    for path in sorted(made.pictures.iterdir()):
        picture = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        real.append(Image.alpha_composite(white, picture).convert("RGB"))
    dino, clip = load_dino(str(made.dino)), load_clip(str(made.clip))
    expected = {}
    for name, encoder in (("dino", dino), ("clip_i", clip)):
        ours, theirs = (encoder.images(images).tolist() for images in (generated, real))
        expected[name] = mean(cosine(one, other) for one in ours for other in theirs)
    texts = clip.texts([plain for plain in PLAIN for _ in range(2)]).tolist()
    expected["clip_t"] = mean(map(cosine, clip.images(generated).tolist(), texts))
    written = json.loads((made.root / "scored" / "evaluation.json").read_text())
    for name, value in expected.items():
        assert made.found[name] == pytest.approx(value, abs=1e-5)
        assert written[name] == made.found[name]
    assert written["generated_pictures"] == 6
    assert written["real_pictures"] == 4
    assert written["loss"] > 0
    assert "contact_sheet" not in written


@pytest.mark.parametrize("adapter", ["whole", None])
def test_pictures_are_the_stock_pipelines(made, tmp_path, adapter):
    """With DoRA and text encoders too; and what a LoRA changes is gone when it is taken off."""
    folder = None if adapter is None else getattr(made, adapter)
    options = {**made.scores, "adapter": None if folder is None else str(folder)}
    more = {"guidance_scale": 3.0, "contact_sheet_adapters": [str(made.whole)]}
    emloc.evaluate(output_dir=tmp_path / "out", **{**options, **more, "clip_model": None})
    name = adapter or "base"
    prompt, seed, path = listed(tmp_path / "out" / "pictures" / name)[1]
    expected = stock(made.base, folder, prompt, seed, guidance_scale=3.0)
    assert Image.open(path).tobytes() == expected.tobytes()
    if folder is not None:
        assert (
            expected.tobytes() != stock(made.base, None, prompt, seed, guidance_scale=3).tobytes()
        )
        other = stock(made.base, folder, prompt, seed, guidance_scale=7.5)
        assert other.tobytes() != expected.tobytes()


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_other_pipelines_draw_with_the_lora(made, tmp_path, kind):
    base = write_pipeline(tmp_path / "base", kind, seed=1)
    component = "unet" if kind == "sdxl" else "transformer"
    adapter = lora(base, tmp_path / "lora", text_encoder=True, component=component)
    options = {**made.scores, "clip_model": None, "num_images_per_prompt": 1}
    options |= {"model_name_or_path": str(base), "adapter": str(adapter)}
    found = emloc.evaluate(output_dir=tmp_path / "out", **options)
    prompt, seed, path = listed(tmp_path / "out" / "pictures" / "lora")[0]
    assert Image.open(path).tobytes() == stock(base, adapter, prompt, seed).tobytes()
    assert Image.open(path).tobytes() != stock(base, None, prompt, seed).tobytes()
    assert -1 <= found["dino"] <= 1


@pytest.mark.parametrize("kind", ["object", "live"])
def test_dreambooths_prompts_are_drawn_and_measured_without_the_token(made, tmp_path, kind):
    options = {**made.scores, "prompts_file": None, "adapter": None, "dino_model": None}
    found = emloc.evaluate(
        output_dir=tmp_path / "out", class_name="square", subject_kind=kind,
        **{**options, "num_images_per_prompt": 1, "num_inference_steps": 1},
    )  # fmt: skip
    drawn = listed(tmp_path / "out" / "pictures" / "base")
    live = kind == "live"
    assert [prompt for prompt, *_ in drawn] == evaluation_prompts("sks", "square", live)
    clip = load_clip(str(made.clip))
    texts = clip.texts(plain_prompts("square", live)).tolist()
    images = clip.images(opened(path for *_, path in drawn)).tolist()
    assert found["clip_t"] == pytest.approx(mean(map(cosine, images, texts)), abs=1e-5)
    assert "dino" not in found
    with_token = clip.texts(evaluation_prompts("sks", "square", live)).tolist()
    assert abs(found["clip_t"] - mean(map(cosine, images, with_token))) > 1e-4


def everything(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*.png")
    }  # fmt: skip


def test_an_interrupted_run_goes_on_and_ends_the_same(made, tmp_path, monkeypatch):
    options = {
        **made.scores, "contact_sheet_adapters": [str(made.whole)], "validation_prompt": PROMPTS[0],
    }  # fmt: skip
    plain = emloc.evaluate(output_dir=tmp_path / "plain", **options)
    draw, drawn = evaluated_pictures.draw_one, []

    def stop(*arguments):
        if len(drawn) == 3:  # one after the base's two
            raise KeyboardInterrupt
        drawn.append(arguments)
        return draw(*arguments)

    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(evaluated_pictures, "draw_one", stop)
        with pytest.raises(KeyboardInterrupt):
            emloc.evaluate(output_dir=out, **options)
    assert not (out / "evaluation.json").exists()
    assert len(listed(out / "pictures" / "base")) == 2
    assert [path.name for path in (out / "pictures" / "whole.partial").glob("*.png")] == ["000.png"]
    with pytest.raises(OutputError, match="holds other pictures"):
        emloc.evaluate(output_dir=out, **{**options, "drawing_seed": 1})

    def count(*arguments):
        drawn.append(arguments)
        return draw(*arguments)

    drawn.clear()
    monkeypatch.setattr(evaluated_pictures, "draw_one", count)
    again = emloc.evaluate(output_dir=out, **options)
    # The second of `whole`; and of `plain` the two that only the scores ask for beside the shared two.
    assert len(drawn) == 1 + 6
    assert everything(out) == everything(tmp_path / "plain")
    assert {k: v for k, v in again.items() if "peak" not in k} == {
        k: v for k, v in plain.items() if "peak" not in k
    }
    drawn.clear()
    assert emloc.evaluate(output_dir=out, **options) == again  # complete already
    assert not drawn


def test_a_picture_that_could_not_be_written_is_not_there(made, tmp_path, monkeypatch):
    sync, written = os.fsync, []

    def full(file):
        written.append(file)
        if len(written) == 3:  # the settings and a picture were written
            raise OSError(28, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match="disk is full"):
            emloc.evaluate(output_dir=tmp_path / "out", **made.scores)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["000.png", "stage_settings.json"]
    found = emloc.evaluate(output_dir=tmp_path / "out", **made.scores)
    assert [found[name] for name in SCORES] == [made.found[name] for name in SCORES]
    assert everything(tmp_path / "out") == everything(made.root / "scored")


def test_settings_know_what_the_named_files_hold(made, tmp_path):
    """The same paths with another content are another evaluation."""
    prompts = tmp_path / "prompts.txt"
    shutil.copy(made.prompts, prompts)
    options = {
        **made.scores, "prompts_file": prompts, "output_dir": tmp_path / "out",
        "num_images_per_prompt": 1, "clip_model": None,
    }  # fmt: skip
    emloc.evaluate(**options)
    prompts.write_text("a sks square\n")
    with pytest.raises(OutputError, match="was made with other contents of the files"):
        emloc.evaluate(**options)


def test_without_these_options_nothing_is_drawn(made, tmp_path):
    found = emloc.evaluate(output_dir=tmp_path / "out", num_inference_steps=2, **made.data)
    assert set(found) >= {"loss", "exact_match", "samples", "peak_bytes"}
    assert not set(found) & {*SCORES, "generated_pictures", "contact_sheet"}
    assert "named_digests" not in found["settings"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["evaluation.json"]
    # And the loss is the same with them.
    with_lora_ = emloc.evaluate(adapter=str(made.plain), **made.data)
    assert with_lora_["loss"] == made.found["loss"]


# ---- the contact sheet


@pytest.fixture(scope="module")
def stages(made):
    """An emulator, and a LoRA of it before and after correction."""
    data = {name: made.data[name] for name in ("dataset", "instance_prompt", "resolution")}
    root = made.root / "stages"
    calibration = {"num_calibration_samples": 4, "calibration_batch_size": 4}
    emulator = emloc.compress(
        model_name_or_path=str(made.base), output_dir=root / "emulator", format="low_rank", keep_ratio=0.5,
        **data, **calibration,
    )  # fmt: skip
    adapter = emloc.train(
        emulator=str(emulator), output_dir=root / "adapter", max_train_steps=2, lora_r=3,
        lora_conv=True, learning_rate=1e-2, **data,
    )  # fmt: skip
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=root / "corrected", limit="none",
        **data, **calibration,
    )  # fmt: skip
    return SimpleNamespace(emulator=emulator, adapter=adapter, corrected=corrected)


def test_contact_sheet_of_base_uncorrected_and_corrected(made, stages, tmp_path):
    options = {**made.data, **made.drawing, "contact_sheet_adapters": [str(stages.adapter)]}
    found = emloc.evaluate(
        adapter=str(stages.corrected), output_dir=tmp_path / "out", validation_prompt=PROMPT,
        **options,
    )  # fmt: skip
    assert found["contact_sheet"] == "contact_sheet.png"
    assert not set(found) & set(SCORES)
    rows = {}
    for name, adapter in {
        "base": None, "adapter": stages.adapter, "corrected": stages.corrected
    }.items():  # fmt: skip
        drawn = listed(tmp_path / "out" / "pictures" / name)
        assert [(prompt, seed) for prompt, seed, _ in drawn] == [(PROMPT, 5), (PROMPT, 6)]
        rows[name] = opened(path for *_, path in drawn)
        assert rows[name][1].tobytes() == stock(made.base, adapter, PROMPT, 6).tobytes()
    assert len({pictures[0].tobytes() for pictures in rows.values()}) == 3
    sheet = (tmp_path / "out" / "contact_sheet.png").read_bytes()
    assert sheet == contact_sheet_png(rows, [PROMPT, PROMPT])
    swapped = {name: rows[name] for name in ("base", "corrected", "adapter")}
    assert sheet != contact_sheet_png(swapped, [PROMPT, PROMPT])
    with Image.open(tmp_path / "out" / "contact_sheet.png") as image:
        assert image.format == "PNG"
        assert image.width > 2 * 100
        assert image.height > 3 * 100


def test_a_caption_is_text_whatever_it_says():
    rows = {"base": [Image.new("RGB", (8, 8))] * 2}
    for captions in (["$x", "a_b^{$"], ["$\\frac$"] * 2):
        assert contact_sheet_png(rows, captions).startswith(b"\x89PNG")


def test_a_prompt_alone_is_drawn_by_the_base_and_the_adapter(made, tmp_path):
    options = {**made.data, **made.drawing, "num_images_per_prompt": 1}
    found = emloc.evaluate(
        adapter=str(made.plain), output_dir=tmp_path / "out", validation_prompt=PROMPT, **options
    )
    sheet = (tmp_path / "out" / found["contact_sheet"]).read_bytes()
    assert sheet.startswith(b"\x89PNG")
    names = {path.parent.name for path in (tmp_path / "out").rglob("*.png")}
    assert {"base", made.plain.name} <= names


def test_contact_sheet_of_the_scored_prompts_shares_their_pictures(made, tmp_path):
    """And adapters of one name have rows of their own; the evaluated one, if listed, is not repeated."""
    shutil.copytree(made.whole, tmp_path / "other" / "plain")
    adapters = [str(made.plain), str(tmp_path / "other" / "plain")]
    emloc.evaluate(
        output_dir=tmp_path / "out", contact_sheet_adapters=adapters,
        **{**made.scores, "clip_model": None},
    )  # fmt: skip
    rows = sorted(path.name for path in (tmp_path / "out" / "pictures").iterdir())
    assert rows == ["base", "plain", "plain-2"]
    first = [(prompt, 5) for prompt in PROMPTS]
    for name, drawn in {"base": first, "plain-2": first}.items():
        assert [one[:2] for one in listed(tmp_path / "out" / "pictures" / name)] == drawn
    assert len(listed(tmp_path / "out" / "pictures" / "plain")) == 6


def test_another_picture_in_the_sheets_place_is_left_alone(made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "contact_sheet.png").write_bytes(b"mine")
    with pytest.raises(OutputError, match="shows something else"):
        emloc.evaluate(
            output_dir=out, contact_sheet_adapters=[str(made.plain)], validation_prompt=PROMPT,
            **made.data, **made.drawing,
        )  # fmt: skip
    assert (out / "contact_sheet.png").read_bytes() == b"mine"
    assert not (out / "evaluation.json").exists()


def test_an_emulator_draws_with_the_lora_that_was_trained_on_it(made, stages, tmp_path):
    options = {
        **made.data, **made.drawing, "model_name_or_path": str(stages.emulator),
        "validation_prompt": PROMPT,
    }  # fmt: skip
    emloc.evaluate(
        output_dir=tmp_path / "out", contact_sheet_adapters=[str(stages.adapter)], **options
    )
    path = listed(tmp_path / "out" / "pictures" / "adapter")[0][2]
    expected = stock(stages.emulator, stages.adapter, PROMPT, 5)
    assert Image.open(path).tobytes() == expected.tobytes()
    with pytest.raises(ConfigError, match="corrected for the original model"):
        emloc.evaluate(
            output_dir=tmp_path / "no", contact_sheet_adapters=[str(stages.corrected)], **options
        )


# ---- a LoRA is used whole or refused


def damaged(made, folder, change, source="whole"):
    """The LoRA with its diffusers file changed."""
    shutil.copytree(getattr(made, source), folder)
    path = folder / DIFFUSERS_NAME
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = change(load_file(path))
    save_file(tensors, path, metadata)
    return folder


def renamed(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def without(part):
    def change(tensors):
        lost = next(key for key in tensors if part in key)
        return {key: value for key, value in tensors.items() if key != lost}

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (renamed("unet.", "transformer."), "uses 54 of its .* not transformer"),
        (renamed("text_encoder.", "text_encoder_2."), "not text_encoder_2"),
        (renamed("attn1.to_q", "attn1.to_z"), "not unet.*attn1.to_z"),
        (renamed("q_proj", "z_proj"), "not text_encoder.*z_proj"),
        (lambda tensors: {f"base_model.model.{k}": v for k, v in tensors.items()}, "uses 0 of its"),
        (without("fc1.lora_B"), "1 tensors of the layers"),
        (lambda tensors: {k: v[..., :-1].contiguous() for k, v in tensors.items()}, "cannot load"),
        (lambda tensors: {"alpha": torch.ones(1)}, "cannot load"),
    ],
)  # fmt: skip
def test_a_lora_that_is_not_used_whole_is_refused(made, tmp_path, change, says):
    folder = damaged(made, tmp_path / "lora", change)
    pipeline = load_pipeline(made.base)
    with pytest.raises(MismatchError, match=says) as caught, with_lora(pipeline, folder):
        pass
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_lora_of_pefts_files_alone_is_drawn_all_the_same(made, tmp_path):
    shutil.copytree(made.whole, tmp_path / "peft")
    (tmp_path / "peft" / DIFFUSERS_NAME).unlink()
    pipeline = load_pipeline(made.base)
    drawn = []
    for folder in (made.whole, tmp_path / "peft", None):
        with with_lora(pipeline, folder) as tuned:
            drawn.append(evaluated_pictures.draw_one(tuned, PROMPT, 0, RESOLUTION, 2).tobytes())
    assert drawn[0] == drawn[1] != drawn[2]
    (tmp_path / "nothing").mkdir()
    with (
        pytest.raises(CheckpointError, match="is not a PEFT adapter"),
        with_lora(pipeline, tmp_path / "nothing"),
    ):
        pass


def test_no_picture_is_drawn_beside_a_lora_that_does_not_fit(made, tmp_path):
    other = write_pipeline(tmp_path / "other", "sd", seed=0, block_out_channels=(16, 24))
    foreign = lora(other, tmp_path / "foreign")
    options = {
        **made.data, **made.drawing, "adapter": str(made.plain), "validation_prompt": PROMPT,
    }  # fmt: skip
    with pytest.raises(MismatchError, match=r"foreign: a StableDiffusionPipeline cannot load it"):
        emloc.evaluate(
            output_dir=tmp_path / "out", contact_sheet_adapters=[str(foreign)], **options
        )
    assert not (tmp_path / "out").exists()


# ---- refusals


def test_what_cannot_be_drawn_is_one_sentence(made, tmp_path):
    out = {"output_dir": tmp_path / "out"}
    encoders = {"dino_model": str(made.dino), "clip_model": str(made.clip)}
    sheet = {"contact_sheet_adapters": [str(made.plain)]}
    subject = {"subject_token": "sks", "class_name": "square"}
    file = tmp_path / "prompts.txt"
    for options, error, says in [
        ({**encoders, **subject}, ConfigError, "output_dir is required"),
        ({**encoders, **out}, ConfigError, r"set subject_token \(sks\) and class_name"),
        ({**encoders, **out, "class_name": "square"}, ConfigError, "subject_token .* is missing"),
        ({**encoders, **out, "subject_token": "sks"}, ConfigError, "class_name .* is missing"),
        ({**encoders, **out, **subject, "class_name": " "}, ConfigError, "class_name is empty"),
        ({**encoders, **out, "prompts_file": made.prompts}, ConfigError, "without subject_token"),
        ({**out, **subject}, ConfigError, "nothing is drawn"),
        ({**sheet, **out}, ConfigError, "but not what to draw"),
        ({**sheet, "validation_prompt": PROMPT}, ConfigError, "output_dir is required"),
        ({**out, "contact_sheet_adapters": ["nowhere"], "validation_prompt": PROMPT},
         CheckpointError, "No folder nowhere"),
        ({**encoders, **out, **subject, "subject_kind": "thing"}, ConfigError, "subject_kind"),
        ({**encoders, **out, **subject, "dino_model": str(tmp_path)}, CheckpointError,
         "no safetensors"),
        ({**encoders, **out, "subject_token": "sks", "prompts_file": file}, DataError,
         "cannot be read"),
    ]:  # fmt: skip
        with pytest.raises(error, match=says) as caught:
            emloc.evaluate(**made.data, **options)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a sks dog\na dog\n", "line 2: 'a dog' does not name the subject; put 'sks' into it"),
        ("a sksy dog\n", "does not name the subject"),
        ("\n sks \n", "line 2: 'sks' says nothing besides 'sks'"),
        ("a sks dog\n\na  sks dog\n", "line 3: 'a sks dog' occurs twice"),
        ("\n\n", "has no prompts"),
    ],
)
def test_prompts_of_ones_own_must_name_the_subject(tmp_path, text, says):
    (tmp_path / "prompts.txt").write_text(text)
    with pytest.raises(DataError, match=says):
        own_prompts(tmp_path / "prompts.txt", "sks")


def test_prompts_of_ones_own_lose_the_token_alone(tmp_path):
    (tmp_path / "prompts.txt").write_text("a <cat> cat\n<cat>, the cat, on a mat\n")
    assert own_prompts(tmp_path / "prompts.txt", "<cat>") == {
        "a <cat> cat": "a cat",
        "<cat>, the cat, on a mat": ", the cat, on a mat",
    }


def test_without_timm_the_message_names_the_extra(made, tmp_path, monkeypatch):
    """Before anything is drawn."""
    timm = tmp_path / "timm-model"
    timm.mkdir()
    (timm / "config.json").write_text('{"architecture": "vit_small_patch16_224"}')
    save_file({"x": torch.zeros(1)}, timm / "model.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(DependencyError, match=r"pip install 'emloc-diffusion\[evaluation\]'"):
        emloc.evaluate(output_dir=tmp_path / "out", **{**made.scores, "dino_model": str(timm)})
    assert not (tmp_path / "out").exists()


def test_other_families_have_no_pictures(made, tmp_path):
    llm = __import__("emloc_llm.example", fromlist=["write_example"])
    with pytest.raises(ConfigError, match="clip_model is an option of the family diffusion"):
        emloc.evaluate(clip_model=str(made.clip), **llm.write_example(tmp_path, 0))


def test_pictures_of_other_weights_than_those_of_the_loss_are_refused(made, tmp_path, monkeypatch):
    """An adapter may say that it runs on dequantised weights, which no pipeline has."""
    monkeypatch.setattr(Rounding, "runs_on", classmethod(lambda cls, manifest: cls()))
    with pytest.raises(ConfigError, match="runs on dequantised ones; merge it"):
        emloc.evaluate(
            output_dir=tmp_path / "e", adapter=str(made.plain), validation_prompt="a dog",
            **made.data, **made.drawing,
        )  # fmt: skip
