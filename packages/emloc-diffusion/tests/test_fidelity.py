"""DreamBooth's scores: the arithmetic, tiny encoders of both libraries, prompts and wrong inputs."""

import math
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
from hypothesis import given, settings
from hypothesis import strategies as st
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
    write_clip,
    write_dino,
)
from transformers import CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import emloc
from emloc.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DependencyError,
    EmlocError,
    MismatchError,
)
from emloc_diffusion.example import write_example
from emloc_diffusion.scoring import (
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    FidelityScores,
    encoders,
    evaluation_prompts,
    load_clip,
    load_dino,
    plain_prompts,
    prompt_fidelity,
    score,
    subject_fidelity,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ---- the arithmetic


def cosine(one, other):
    return math.fsum(a * b for a, b in zip(one, other)) / (math.hypot(*one) * math.hypot(*other))


def by_loops(first, second):
    pairs = [cosine(one, other) for one in first.tolist() for other in second.tolist()]
    return math.fsum(pairs) / len(pairs)


def row_by_row(first, second):
    pairs = [cosine(one, other) for one, other in zip(first.tolist(), second.tolist())]
    return math.fsum(pairs) / len(pairs)


ENTRIES = st.floats(-100, 100, allow_subnormal=False).map(lambda value: round(value, 3))


@st.composite
def vectors(draw, rows, width):
    row = st.lists(ENTRIES, min_size=width, max_size=width).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.float64)


@st.composite
def two_sets(draw, same_rows=False):
    width, n, m = (draw(st.integers(1, 6)) for _ in range(3))
    return draw(vectors(n, width)), draw(vectors(n if same_rows else m, width))


@given(two_sets())
def test_subject_fidelity_is_the_mean_of_all_pairs(sets):
    generated, real = sets
    found = subject_fidelity(generated, real)
    assert found == pytest.approx(by_loops(generated, real), abs=1e-12)
    assert subject_fidelity(real, generated) == pytest.approx(found, abs=1e-14)
    assert -1 <= found <= 1


@given(two_sets(same_rows=True))
def test_prompt_fidelity_is_the_mean_of_the_rows(sets):
    images, texts = sets
    found = prompt_fidelity(images, texts)
    assert found == pytest.approx(row_by_row(images, texts), abs=1e-12)
    assert -1 <= found <= 1


@given(two_sets(same_rows=True), st.sampled_from([1e-300, 1e-30, 3.0, 1e150, 1e300]))
def test_length_does_not_count(sets, factor):
    first, second = sets
    for fidelity in (subject_fidelity, prompt_fidelity):
        expected = fidelity(first, second)
        assert fidelity(first * factor, second) == pytest.approx(expected, abs=1e-12)
        assert fidelity(-first, second) == pytest.approx(-expected, abs=1e-12)


@given(two_sets())
def test_every_real_picture_counts_alike(sets):
    generated, real = sets
    each = [subject_fidelity(generated, row[None]) for row in real]
    assert subject_fidelity(generated, real) == pytest.approx(
        math.fsum(each) / len(each), abs=1e-12
    )


def test_a_picture_agrees_with_itself_exactly():
    one = torch.tensor([[0.1, 0.7, -0.3]])
    assert subject_fidelity(one, one) == pytest.approx(1, abs=1e-15)
    assert subject_fidelity(one, one) <= 1
    assert subject_fidelity(one, -one) >= -1
    assert subject_fidelity(torch.eye(3)[:1], torch.eye(3)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_summed_in_float64(dtype):
    generated, real = torch.randn(40, 384).to(dtype), torch.randn(7, 384).to(dtype)
    expected = by_loops(generated.double(), real.double())
    assert subject_fidelity(generated, real) == pytest.approx(expected, abs=1e-13)
    texts = torch.randn(40, 384).to(dtype)
    expected = row_by_row(generated.double(), texts.double())
    assert prompt_fidelity(generated, texts) == pytest.approx(expected, abs=1e-13)


def spoiled(value, row=1):
    matrix = torch.ones(3, 4)
    matrix[row, 2] = value
    return matrix


@pytest.mark.parametrize("fidelity", [subject_fidelity, prompt_fidelity])
@pytest.mark.parametrize(
    ("bad", "error", "says"),
    [
        (spoiled(float("nan")), DataError, "embedding 1 has NaN or infinity"),
        (spoiled(float("-inf"), row=2), DataError, "embedding 2 has NaN or infinity"),
        (torch.tensor([[1.0] * 4, [1.0] * 4, [0.0] * 4]), DataError, "embedding 2 is all zeros"),
        (torch.ones(0, 4), DataError, "at least one"),
        (torch.ones(3, 0), DataError, "at least one"),
        (torch.ones(4), MismatchError, "expected (how many, width)"),
        (torch.ones(1, 3, 4), MismatchError, "expected (how many, width)"),
        (torch.ones(3, 5), MismatchError, "5"),
    ],
)
def test_unusable_embeddings_are_refused(fidelity, bad, error, says):
    good = torch.ones(3, 4)
    for arguments in ((bad, good), (good, bad)):
        with pytest.raises(error) as caught:
            fidelity(*arguments)
        assert says in str(caught.value)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, EmlocError)


def test_prompts_and_pictures_must_be_as_many():
    with pytest.raises(MismatchError, match="one text of the same encoder per image"):
        prompt_fidelity(torch.ones(3, 4), torch.ones(2, 4))


# ---- prompts


def test_there_are_25_prompts_for_things_and_for_live_subjects():
    for templates in (OBJECT_PROMPTS, LIVE_PROMPTS):
        assert len(templates) == len(set(templates)) == 25
        for template in templates:
            assert template.startswith("a ")
            assert template.count("{0} {1}") == 1
            assert template.replace("{0} {1}", "").count("{") == 0
    assert len(set(OBJECT_PROMPTS) & set(LIVE_PROMPTS)) == 15


def test_prompts_name_token_and_class():
    assert evaluation_prompts("sks", "dog", True)[10] == "a sks dog wearing a red hat"
    assert evaluation_prompts("sks", "vase", False)[12] == (
        "a sks vase with the Eiffel Tower in the background"
    )
    assert plain_prompts("stuffed animal", live=False)[-1] == "a cube shaped stuffed animal"


@given(st.text(min_size=1).filter(str.strip), st.text(min_size=1).filter(str.strip), st.booleans())
def test_plain_prompts_are_the_same_without_the_token(token, noun, live):
    full, plain = evaluation_prompts(token, noun, live), plain_prompts(noun, live)
    assert len(full) == len(plain) == 25
    for template, with_token, without in zip(LIVE_PROMPTS if live else OBJECT_PROMPTS, full, plain):
        before, after = template.split("{0} {1}")
        assert with_token == f"{before}{token.strip()} {noun.strip()}{after}"
        assert without == f"{before}{noun.strip()}{after}"


def test_empty_words_are_refused():
    with pytest.raises(ConfigError, match="subject_token is empty"):
        evaluation_prompts(" ", "dog", True)
    for call in (lambda: evaluation_prompts("sks", "", True), lambda: plain_prompts(" ", False)):
        with pytest.raises(ConfigError, match="class_name is empty"):
            call()


# ---- tiny encoders


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Anything that reaches for the network fails its test."""

    def refuse(*_arguments, **_options):
        raise AssertionError("a connection was tried")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    return write_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


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


# ---- all three scores


def test_scores_of_a_subject(dino_folder, clip_folder):
    dino, clip = load_dino(str(dino_folder)), load_clip(str(clip_folder))
    prompts = plain_prompts("dog", True)[:3]
    generated = [(prompts[seed % 3], picture(seed, (32, 32))) for seed in range(7)]
    real = [picture(seed, (50, 40)) for seed in range(20, 25)]
    found = score(generated, real, dino, clip)

    images = [image for _, image in generated]
    texts = clip.texts([text for text, _ in generated]).double()
    in_clip = clip.images(images).double()
    assert (found.generated_count, found.real_count) == (7, 5)
    assert found.dino == pytest.approx(
        by_loops(dino.images(images).double(), dino.images(real).double()), abs=1e-6
    )
    assert found.clip_i == pytest.approx(by_loops(in_clip, clip.images(real).double()), abs=1e-6)
    assert found.clip_t == pytest.approx(row_by_row(in_clip, texts), abs=1e-6)
    turned = [
        (text, image) for (text, _), (_, image) in zip(generated, generated[1:] + generated[:1])
    ]
    assert score(turned, real, dino, clip).clip_t != pytest.approx(found.clip_t, abs=1e-5)


class Table:
    """Looks embeddings up: pictures by width, texts by word count."""

    def images(self, images):
        return torch.stack([torch.eye(3)[image.width - 1] for image in images])

    def texts(self, texts):
        assert len(set(texts)) == len(texts)
        return torch.stack([torch.eye(3)[len(text.split()) - 1] for text in texts])


def test_each_picture_meets_its_own_prompt_and_all_real_pictures():
    one, two, three = (Image.new("RGB", (width, 1)) for width in (1, 2, 3))
    found = score(
        [("a", one), ("a b", two), ("a", three), ("a b", one)], [one, one, two, three],
        Table(), Table(),
    )  # fmt: skip
    same = [2, 1, 1, 2]  # real pictures with the embedding of each generated one
    assert found.dino == pytest.approx(sum(same) / 16)
    assert found.clip_i == found.dino
    assert found.clip_t == pytest.approx(2 / 4)
    assert found == FidelityScores(found.dino, found.clip_i, found.clip_t, 4, 4)


def test_nothing_to_score_is_refused():
    one = Image.new("RGB", (1, 1))
    with pytest.raises(DataError, match="no generated pictures"):
        score([], [one], Table(), Table())
    with pytest.raises(DataError, match="no real pictures"):
        score([("a", one)], [], Table(), Table())


@settings(max_examples=30)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "a b", "a b c"]), st.integers(1, 3)), min_size=1, max_size=9
    )
)
def test_clip_t_counts_the_pictures_that_match(rows):
    generated = [(text, Image.new("RGB", (width, 1))) for text, width in rows]
    matching = sum(len(text.split()) == width for text, width in rows)
    found = score(generated, [Image.new("RGB", (1, 1))], Table(), Table())
    assert found.clip_t == pytest.approx(matching / len(rows))
