"""Latents and prompt embeddings are those of the stock pipelines, bit for bit."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from emloc.errors import CheckpointError, ConfigError, NumericalError
from emloc_diffusion.encode import text
from emloc_diffusion.encode.latents import encode_latents
from emloc_diffusion.encode.text import encode_prompts
from emloc_diffusion.example_pipelines import KINDS, write_pipeline

PROMPTS = ["a photo of sks dog", "", "a very long one, " + "again and " * 20, "a photo of sks dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: write_pipeline(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def pipelines(folders):
    made = {kind: DiffusionPipeline.from_pretrained(folder) for kind, folder in folders.items()}
    for pipeline in made.values():
        pipeline.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 48, 64, generator=torch.manual_seed(0)) * 2 - 1


def copied(folder, tmp_path, **changes):
    """A copy whose model_index.json is changed."""
    target = tmp_path / "copy"
    shutil.copytree(folder, target)
    index = json.loads((target / "model_index.json").read_text())
    (target / "model_index.json").write_text(json.dumps({**index, **changes}))
    return target


@pytest.mark.parametrize("kind", KINDS)
def test_example_pipelines_generate(kind, pipelines, folders, tmp_path):
    def image(pipeline, prompt):
        more = {} if kind == "flux" else {"guidance_scale": 5.0}
        return pipeline(
            prompt, num_inference_steps=2, height=64, width=64, output_type="np",
            generator=torch.manual_seed(0), **more,
        ).images  # fmt: skip

    dog, cat = (image(pipelines[kind], prompt) for prompt in ("sks dog", "cat"))
    assert dog.shape == (1, 64, 64, 3)
    assert abs(dog - cat).mean() > 1e-3
    before = torch.get_rng_state()
    again = write_pipeline(tmp_path / "again", kind)
    assert torch.equal(before, torch.get_rng_state())
    for weights in folders[kind].rglob("*.safetensors"):
        assert weights.read_bytes() == (again / weights.relative_to(folders[kind])).read_bytes()


def test_example_pipeline_takes_dtype_seed_and_options(tmp_path, pipelines):
    folder = write_pipeline(tmp_path / "p", "sd", seed=1, dtype=torch.bfloat16, layers_per_block=2)
    unet = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16).unet
    assert unet.config.layers_per_block == 2
    assert unet.dtype == torch.bfloat16
    assert not torch.equal(unet.conv_in.weight.float(), pipelines["sd"].unet.conv_in.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_the_vaes(kind, folders, pipelines, pictures):
    moments = encode_latents(folders[kind], pictures)
    vae = pipelines[kind].vae
    shift = {"sd": 0.0, "sdxl": 0.0, "sd3": 0.0609, "flux": 0.1159}[kind]
    scale = {"sd": 0.18215, "sdxl": 0.13025, "sd3": 1.5305, "flux": 0.3611}[kind]
    assert moments.mean.shape == (3, vae.config.latent_channels, 6, 8)
    assert not moments.mean.is_inference()
    for number, picture in enumerate(pictures):
        with torch.no_grad():
            posterior = vae.encode(picture[None]).latent_dist
        torch.testing.assert_close(moments.mean[number], (posterior.mean[0] - shift) * scale)
        torch.testing.assert_close(moments.std[number], posterior.std[0] * scale)
    # A sample is what the pipeline decodes: its own inverse brings back the posterior's sample.
    sample = moments.sample(torch.manual_seed(7))
    noise = torch.randn(moments.mean.shape, generator=torch.manual_seed(7))
    with torch.no_grad():
        posterior = vae.encode(pictures).latent_dist
    inverse = sample / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    torch.testing.assert_close(inverse, posterior.mean + posterior.std * noise)


def test_latents_do_not_depend_on_neighbours(folders, pictures):
    together, alone = (encode_latents(folders["sd"], batch) for batch in (pictures, pictures[1:2]))
    assert torch.equal(together.mean[1:2], alone.mean)
    assert torch.equal(together.std[1:2], alone.std)


def test_latents_of_half_precision(folders, pictures):
    exact, bfloat, half = (
        encode_latents(folders["sdxl"], pictures, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
    assert bfloat.mean.dtype == torch.float32
    assert torch.equal(exact.mean, half.mean)  # force_upcast
    assert not torch.equal(exact.mean, bfloat.mean)
    torch.testing.assert_close(exact.mean, bfloat.mean, atol=0.02, rtol=0.1)


def test_latents_with_statistics_by_channel(folders, pictures, tmp_path):
    folder = copied(folders["sdxl"], tmp_path)
    path = folder / "vae" / "config.json"
    center, spread = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    config = {**json.loads(path.read_text()), "latents_mean": center, "latents_std": spread}
    path.write_text(json.dumps(config))
    plain, moments = (encode_latents(at, pictures) for at in (folders["sdxl"], folder))
    scale = torch.tensor(spread)[:, None, None]
    expected = (plain.mean - torch.tensor(center)[:, None, None] * 0.13025) / scale
    torch.testing.assert_close(moments.mean, expected)
    torch.testing.assert_close(moments.std, plain.std / scale)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_the_pipelines(kind, folders, pipelines):
    encoded = encode_prompts(folders[kind], PROMPTS)
    for prompt, tensors in zip(PROMPTS, encoded):
        more = {} if kind == "flux" else {"do_classifier_free_guidance": False}
        if kind == "sd3":
            more |= {"prompt_2": prompt, "prompt_3": prompt}
        with torch.no_grad():
            stock = pipelines[kind].encode_prompt(
                prompt, device=torch.device("cpu"), num_images_per_prompt=1, **more,
            )  # fmt: skip
        pooled = {"sd": None, "sdxl": stock[2:3], "sd3": stock[2:3], "flux": stock[1:2]}[kind]
        assert torch.equal(tensors["encoder_hidden_states"], stock[0][0])
        assert not tensors["encoder_hidden_states"].requires_grad
        if pooled is None:
            assert set(tensors) == {"encoder_hidden_states"}
        else:
            assert set(tensors) == {"encoder_hidden_states", "pooled"}
            assert torch.equal(tensors["pooled"], pooled[0][0])
    shape = {"sd": (77, 20), "sdxl": (77, 48), "sd3": (77 + 256, 56), "flux": (512, 56)}[kind]
    assert encoded[0]["encoder_hidden_states"].shape == shape
    width = {"sdxl": (24,), "sd3": (44,), "flux": (20,)}.get(kind)
    assert width is None or encoded[0]["pooled"].shape == width
    states = [tensors["encoder_hidden_states"] for tensors in encoded]
    assert torch.equal(states[0], states[3])
    assert not torch.equal(states[0], states[1])
    encoded[0]["more"] = torch.zeros(1)
    assert "more" not in encoded[3]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_states_are_the_layers_they_should_be(kind, folders, pipelines):
    """Told apart from the stock `encode_prompt`: last states of CLIP for sd, penultimate of both for sdxl."""
    pipeline = pipelines[kind]
    pairs = [(pipeline.tokenizer, pipeline.text_encoder)]
    if kind == "sdxl":
        pairs.append((pipeline.tokenizer_2, pipeline.text_encoder_2))
    states = []
    for tokenizer, encoder in pairs:
        ids = tokenizer(["dog"], padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            out = encoder(ids, output_hidden_states=True)
        states.append(out.last_hidden_state if kind == "sd" else out.hidden_states[-2])
    (encoded,) = encode_prompts(folders[kind], ["dog"])
    assert torch.equal(encoded["encoder_hidden_states"], torch.cat(states, -1)[0])
    if kind == "sdxl":
        assert torch.equal(encoded["pooled"], out.text_embeds[0])


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_max_length_is_of_t5(kind, folders):
    short, long = (encode_prompts(folders[kind], ["dog"], max_length=n)[0] for n in (16, 32))
    clip = 77 if kind == "sd3" else 0
    assert short["encoder_hidden_states"].shape == (clip + 16, 56)
    assert long["encoder_hidden_states"].shape == (clip + 32, 56)
    assert torch.equal(short["pooled"], long["pooled"])


def test_sd3_without_t5(folders, tmp_path):
    folder = copied(folders["sd3"], tmp_path, text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    for weights in (folder / "transformer").glob("*.safetensors"):
        weights.unlink()  # only its configuration is needed
    (with_t5,) = encode_prompts(folders["sd3"], ["dog"])
    (without,) = encode_prompts(folder, ["dog"])
    states, expected = (made["encoder_hidden_states"] for made in (without, with_t5))
    assert states.shape == expected.shape
    assert torch.equal(states[:77], expected[:77])
    assert not states[77:].any()
    assert torch.equal(without["pooled"], with_t5["pooled"])


def test_prompts_of_half_precision(folders):
    (exact,) = encode_prompts(folders["flux"], ["dog"], max_length=8)
    (bfloat,) = encode_prompts(folders["flux"], ["dog"], max_length=8, dtype=torch.bfloat16)
    for name, tensor in bfloat.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.float(), exact[name], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_needed_is_read(kind, folders, tmp_path, pictures):
    folder = copied(folders[kind], tmp_path)
    for part in ("unet", "transformer"):
        shutil.rmtree(folder / part, ignore_errors=True)
    shutil.copytree(folder, tmp_path / "text", ignore=shutil.ignore_patterns("vae"))
    shutil.copytree(folder, tmp_path / "vae", ignore=shutil.ignore_patterns("text_*", "token*"))
    assert encode_prompts(tmp_path / "text", ["dog"])
    assert len(encode_latents(tmp_path / "vae", pictures).mean) == 3


def test_no_prompts(folders):
    assert encode_prompts(folders["sd"], []) == []


def test_encodings_name_pipelines_of_diffusers(pipelines):
    assert {type(pipeline).__name__ for pipeline in pipelines.values()} == set(text.ENCODINGS)


def test_bad_input_is_one_sentence(folders, tmp_path, pictures):
    with pytest.raises(CheckpointError, match="no model_index"):
        encode_prompts(tmp_path, ["dog"])
    with pytest.raises(ConfigError, match=r"multiple of 8\.$"):
        encode_latents(folders["sd"], pictures[..., :60])
    with pytest.raises(ConfigError, match="do not fit"):
        encode_latents(folders["sd"], pictures[:, :1])
    with pytest.raises(ConfigError, match="fixed length of CLIP"):
        encode_prompts(folders["sdxl"], ["dog"], max_length=100)
    with pytest.raises(ConfigError, match="1 or more"):
        encode_prompts(folders["flux"], ["dog"], max_length=0)
    with pytest.raises(CheckpointError, match="WanPipeline"):
        encode_prompts(copied(folders["sd"], tmp_path / "1", _class_name="WanPipeline"), ["dog"])
    with pytest.raises(CheckpointError, match="is from os; only components from"):
        encode_prompts(
            copied(folders["sd"], tmp_path / "2", text_encoder=["os", "system"]), ["dog"]
        )
    with pytest.raises(CheckpointError, match="AutoencoderTiny, not"):
        encode_latents(
            copied(folders["sd"], tmp_path / "3", vae=["diffusers", "AutoencoderTiny"]), pictures
        )
    broken = copied(folders["sd"], tmp_path / "4")
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"12345678")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="text encoders cannot be loaded"):
        encode_prompts(broken, ["dog"])
    with pytest.raises(CheckpointError, match="VAE cannot be loaded"):
        encode_latents(broken, pictures)
    with pytest.raises(NumericalError, match="not finite"):
        encode_latents(folders["sd"], pictures * float("nan"))
    (broken / "model_index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON"):
        encode_prompts(broken, ["dog"])
