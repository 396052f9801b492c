"""Encoders of DreamBooth's scores, tiny ones of both libraries, and wrong inputs. No network."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import torchvision_schemas  # noqa: F401  (before what may import torchvision)
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_encoders import (
    DEPTH,
    HEADS,
    PATCH,
    SIDE,
    WIDTH,
    picture,
    vit,
    write_dino,
)
from transformers import CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import emloc
from emloc.errors import (
    CheckpointError,
    DataError,
    DependencyError,
)
from emloc_diffusion.example import write_example
from emloc_diffusion.scoring import (
    encoders,
    load_clip,
    load_dino,
    prompt_fidelity,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Anything that reaches for the network fails its test."""

    def refuse(*_arguments, **_options):
        raise AssertionError("a connection was tried")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pixels_by_hand(image, shorter, side, mean, deviation):
    """Resize, centre and normalise in float64, with Pillow alone."""
    width, height = image.size
    scale = shorter / min(width, height)
    size = (shorter, int(height * scale)) if width < height else (int(width * scale), shorter)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    cropped = resized.crop((left, top, left + side, top + side))
    values = torch.tensor(list(cropped.tobytes()), dtype=torch.float64).view(side, side, 3) / 255
    values = (values - torch.tensor(mean).double()) / torch.tensor(deviation).double()
    return values.permute(2, 0, 1)


def dino_pixels(images):
    return torch.stack([pixels_by_hand(image, 37, SIDE, *IMAGENET) for image in images])  # 32 · 8/7


@pytest.mark.parametrize("size", [(48, 40), (40, 49), (33, 33)])
def test_dino_is_the_class_token_of_the_prepared_picture(dino_folder, size):
    images = [picture(seed, size) for seed in range(3)]
    found = load_dino(str(dino_folder)).images(images)
    with torch.no_grad():
        expected = vit().double()(pixel_values=dino_pixels(images)).last_hidden_state[:, 0]
    assert found.dtype == torch.float32
    assert found.shape == (3, WIDTH)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
    assert (found[0] - found[1]).norm() > 0.1  # far more than the tolerance


def test_pictures_do_not_depend_on_those_beside_them(dino_folder, clip_folder):
    images = [picture(seed, (30 + seed, 50 - seed)) for seed in range(encoders.BATCH + 3)]
    for encoder in (load_dino(str(dino_folder)), load_clip(str(clip_folder))):
        together = encoder.images(images)
        alone = torch.cat([encoder.images([image]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        assert not together.requires_grad


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_pictures_of_other_modes_are_read_as_rgb(dino_folder, clip_folder, mode):
    other = picture(3, mode=mode)
    for encoder in (load_dino(str(dino_folder)), load_clip(str(clip_folder))):
        assert torch.equal(encoder.images([other]), encoder.images([other.convert("RGB")]))


def test_a_turned_photo_is_read_upright(dino_folder, tmp_path):
    upright = picture(4)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    encoder = load_dino(str(dino_folder))
    with Image.open(tmp_path / "turned.png") as turned:
        assert torch.equal(encoder.images([turned]), encoder.images([upright]))


def test_clip_is_what_transformers_computes(clip_folder):
    encoder = load_clip(str(clip_folder))
    images = [picture(seed, (45, 60)) for seed in range(3)]
    texts = ["a dog", "a dog in the snow", "a"]
    processor = CLIPProcessor(encoder.prepare, encoder.tokenizer)
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    model = CLIPModel.from_pretrained(clip_folder).double().eval()
    with torch.no_grad():
        output = model(**inputs.to(torch.float64))
    found = encoder.images(images), encoder.texts(texts)
    for embeddings, expected in zip(found, (output.image_embeds, output.text_embeds)):
        assert embeddings.dtype == torch.float32
        assert embeddings.shape == (3, 18)
        unit = torch.nn.functional.normalize(embeddings.double())
        torch.testing.assert_close(unit, expected, atol=2e-5, rtol=2e-5)
    cosines = output.logits_per_image / model.logit_scale.exp()
    assert prompt_fidelity(*found) == pytest.approx(cosines.diagonal().mean().item(), abs=2e-5)


def test_clip_prepares_pictures_as_its_own_file_says(clip_folder):
    mean, deviation = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    images = [picture(seed, (45, 60)) for seed in range(2)]
    by_hand = torch.stack([pixels_by_hand(one, SIDE, SIDE, mean, deviation) for one in images])
    model = CLIPModel.from_pretrained(clip_folder).double().eval()
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=by_hand).pooler_output
    found = load_clip(str(clip_folder)).images(images)
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


def test_clip_reads_what_transformers_saves_today(clip_folder, tmp_path):
    """One processor_config.json instead of preprocessor_config.json."""
    encoder = load_clip(str(clip_folder))
    encoder.model.save_pretrained(tmp_path)
    CLIPProcessor(encoder.prepare, encoder.tokenizer).save_pretrained(tmp_path)
    again, images = load_clip(str(tmp_path)), [picture(1), picture(2)]
    assert torch.equal(again.images(images), encoder.images(images))
    assert torch.equal(again.texts(["a cat"]), encoder.texts(["a cat"]))
    assert isinstance(again.prepare, CLIPImageProcessorPil)


def test_texts_do_not_depend_on_those_beside_them_and_long_ones_are_cut(clip_folder):
    encoder = load_clip(str(clip_folder))
    texts = [*(["a dog"] * encoders.BATCH), "a wet cat", "b" * 90]
    together = encoder.texts(texts)
    alone = torch.cat([encoder.texts([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


# ---- timm

TIMM_FOLDER = Path(sys.prefix) / "timm"
"""timm and torchvision, where `make` puts them: beside a torch of another build torchvision breaks
transformers, so they are not among the other packages."""

with_timm = pytest.mark.skipif("EMLOC_WITH_TIMM" not in os.environ, reason="run by the test below")


def test_with_timm(tmp_path):
    """The tests marked `with_timm`, in a process that has it."""
    environment = {**os.environ, "PYTHONPATH": str(TIMM_FOLDER), "EMLOC_WITH_TIMM": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", f"cache_dir={tmp_path}", __file__,
         "-k", "timm and not with_timm"],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    assert re.search(r"\b(\d+) passed", run.stdout).group(1) not in ("0", "1")
    assert "skipped" not in run.stdout


def to_timm(model):
    """The names of timm, which keeps query, key and value in one matrix."""
    theirs = model.state_dict()
    names = {
        "patch_embed.proj": ["embeddings.patch_embeddings.projection"],
        "norm": ["layernorm"],
    }
    for block in range(DEPTH):
        names |= {
            f"blocks.{block}.{ours}": [f"layers.{block}.{part}" for part in parts]
            for ours, parts in {
                "attn.qkv": [f"attention.{one}_proj" for one in "qkv"],
                "attn.proj": ["attention.o_proj"],
                "norm1": ["layernorm_before"],
                "norm2": ["layernorm_after"],
                "mlp.fc1": ["mlp.fc1"],
                "mlp.fc2": ["mlp.fc2"],
            }.items()
        }
    made = {
        f"{ours}.{leaf}": torch.cat([theirs[f"{part}.{leaf}"] for part in parts])
        for ours, parts in names.items()
        for leaf in ("weight", "bias")
    }
    made["cls_token"] = theirs["embeddings.cls_token"]
    made["pos_embed"] = theirs["embeddings.position_embeddings"]
    return made


def write_timm(folder, architecture="vit_small_patch16_224", weights=None, **arguments):
    """As timm's own repositories on the hub are."""
    import timm
    from timm.models import save_for_hf

    model = timm.create_model(architecture, num_classes=0, **arguments)
    if weights is not None:
        model.load_state_dict(weights)
    save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
    return folder


TINY = {
    "img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS,
}  # fmt: skip


@with_timm
def test_the_same_weights_in_timm_give_the_same_embeddings(dino_folder, tmp_path):
    write_timm(tmp_path, weights=to_timm(vit()), **TINY)
    images = [picture(seed, (47, 61)) for seed in range(3)]
    found = load_dino(str(tmp_path)).images(images)
    assert found.dtype == torch.float32
    expected = load_dino(str(dino_folder)).images(images)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        direct = vit().double()(pixel_values=dino_pixels(images)).last_hidden_state[:, 0]
    torch.testing.assert_close(found.double(), direct, atol=2e-5, rtol=2e-5)
    again = load_dino(f"local-dir:{tmp_path}").images(images)
    assert torch.equal(again, found)


@with_timm
@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_224.dino", "timm/vit_small_patch16_224.dino",
     "hf-hub:timm/vit_small_patch16_224.dino"],
)  # fmt: skip
def test_timm_names_are_found_in_the_hubs_cache(hub_cache, dino_folder, tmp_path, name):
    write_timm(tmp_path / "saved", weights=to_timm(vit()), **TINY)
    hub_cache("timm/vit_small_patch16_224.dino", "main", tmp_path / "saved")
    found = load_dino(name).images([picture(0)])
    expected = load_dino(str(dino_folder)).images([picture(0)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@with_timm
def test_evaluate_asks_timm(tmp_path):
    """The same score from the same weights, whichever library has them."""
    write_timm(tmp_path / "timm", weights=to_timm(vit()), **TINY)
    example = write_example(tmp_path, seed=0)
    (tmp_path / "prompts.txt").write_text("a sks square\na red sks square\n")
    dino = {
        name: emloc.evaluate(
            output_dir=tmp_path / name, dino_model=str(folder), subject_token="sks",
            prompts_file=tmp_path / "prompts.txt", num_images_per_prompt=1, num_inference_steps=1,
            num_noise_samples=1, **example,
        )["dino"]
        for name, folder in {"a": tmp_path / "timm", "b": write_dino(tmp_path / "vit")}.items()
    }  # fmt: skip
    assert dino["a"] == pytest.approx(dino["b"], abs=2e-5)
    assert -1 <= dino["a"] < 0.999


@with_timm
def test_timm_models_that_cannot_serve_are_refused(tmp_path):
    write_timm(tmp_path / "resnet", "test_resnet")
    with pytest.raises(CheckpointError, match="without a class token"):
        load_dino(str(tmp_path / "resnet"))
    weights = to_timm(vit())
    folder = write_timm(tmp_path / "short", weights=weights, **TINY)
    weights.pop("norm.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"timm cannot load .*short"):
        load_dino(str(folder))
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_dino(str(folder))


def fake_timm(folder, monkeypatch, body):
    (folder / "timm.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise ModuleNotFoundError('No module', name='timm')", r"emloc-diffusion\[evaluation\]"),
        ("import torchvision.nothing", r"timm needs torchvision"),
        ("raise RuntimeError('operator torchvision::nms does not exist\\nmore')",
         r"torchvision::nms does not exist\); install the torchvision that fits"),
    ],
)  # fmt: skip
def test_what_timm_needs_is_said_in_one_sentence(tmp_path, monkeypatch, body, says):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "vit_small_patch16_224"}')
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    fake_timm(tmp_path, monkeypatch, body)
    with pytest.raises(DependencyError, match=says) as caught:
        load_dino(str(folder))
    assert "\n" not in str(caught.value)
    assert "facebook/dino-vits16" in str(caught.value)


# ---- names and folders that do not serve


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Puts folders into an empty cache of the hub, as if they had been downloaded."""
    root = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def put(repository, revision, folder):
        home = root / f"models--{repository.replace('/', '--')}"
        commit = f"{len(list(home.glob('snapshots/*'))):040x}"
        shutil.copytree(folder, home / "snapshots" / commit)
        reference = home / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)

    return put


def test_clips_safetensors_are_found_where_the_hub_has_them(hub_cache, clip_folder, tmp_path):
    """The main branch of the default has pickled weights, which are neither fetched nor read."""
    main = tmp_path / "main"
    main.mkdir()
    (main / "config.json").write_text('{"model_type": "clip"}')
    (main / "pytorch_model.bin").write_bytes(b"never read")
    hub_cache("openai/clip-vit-base-patch32", "main", main)
    with pytest.raises(CheckpointError, match="refs/pr/15"):
        load_clip()
    hub_cache("openai/clip-vit-base-patch32", "refs/pr/15", clip_folder)
    expected = load_clip(str(clip_folder)).images([picture(0)])
    assert torch.equal(load_clip().images([picture(0)]), expected)
    hub_cache("someone/clip", "v2", clip_folder)
    assert torch.equal(load_clip("someone/clip@v2").images([picture(0)]), expected)


def test_without_safetensors_on_the_hub_the_message_says_what_else(hub_cache, tmp_path):
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "config.json").write_text('{"model_type": "vit"}')
    hub_cache("facebook/dino-vits16", "main", tmp_path / "main")
    with pytest.raises(CheckpointError, match=r"no safetensors.*timm/vit_small_patch16_224\.dino"):
        load_dino()


@pytest.mark.parametrize("load", [load_dino, load_clip])
def test_offline_nothing_is_tried(hub_cache, load):
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE") as caught:
        load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_dino, load_clip])
def test_a_network_that_fails_is_one_sentence(load, monkeypatch):
    asked = []

    def fail(repository, **options):
        asked.append((repository, options))
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr(encoders, "snapshot_download", fail)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        CheckpointError, match="Name or service not known.*check the name"
    ) as caught:
        load("owner/model")
    assert "\n" not in str(caught.value)
    [(repository, options)] = asked
    assert repository == "owner/model"
    assert options["local_files_only"] is False
    assert not any("bin" in pattern or pattern == "*" for pattern in options["allow_patterns"])


@pytest.mark.parametrize("load", [load_dino, load_clip])
def test_folders_that_do_not_serve(load, tmp_path, dino_folder, clip_folder):
    with pytest.raises(CheckpointError, match="No folder"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="No folder"):
        load("./nowhere/at all")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match="no safetensors"):
        load(str(tmp_path / "pickled"))
    good, other = (dino_folder, clip_folder) if load is load_dino else (clip_folder, dino_folder)
    with pytest.raises(CheckpointError, match="is of type"):
        load(str(other))
    cut = tmp_path / "cut"
    shutil.copytree(good, cut)
    (cut / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:999])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(str(cut))
    weights = load_file(good / "model.safetensors")
    weights.pop(next(name for name in weights if ".0." in name))
    save_file(weights, cut / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights of .*layers\.0\..*1 in all"):
        load(str(cut))
    (cut / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(str(cut))


@pytest.mark.parametrize(
    "lost", [["preprocessor_config.json"], ["tokenizer.json", "tokenizer_config.json"]]
)
def test_clip_without_its_processor_is_refused(clip_folder, tmp_path, lost):
    shutil.copytree(clip_folder, tmp_path / "clip")
    for name in lost:
        (tmp_path / "clip" / name).unlink()
    with pytest.raises(CheckpointError, match="no image processor or tokenizer"):
        load_clip(str(tmp_path / "clip"))


def test_what_is_no_picture_is_refused(dino_folder, clip_folder):
    for encoder in (load_dino(str(dino_folder)), load_clip(str(clip_folder))):
        with pytest.raises(DataError, match="no pictures"):
            encoder.images([])
        with pytest.raises(DataError, match=r"Picture 1 is a str; open it with PIL\.Image\.open"):
            encoder.images([picture(0), "dog.jpg"])
    with pytest.raises(DataError, match="no texts"):
        load_clip(str(clip_folder)).texts([])
