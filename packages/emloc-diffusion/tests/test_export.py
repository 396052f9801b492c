"""Exported files, loaded by the stock pipelines, act as the adapter does in PEFT; no key is lost."""

import json
import math
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emloc.artefacts.adapter import Adapter
from emloc.errors import CheckpointError, ConfigError, MismatchError, NumericalError, OutputError
from emloc_diffusion.denoisers import DENOISERS
from emloc_diffusion.example_pipelines import KINDS, write_pipeline
from emloc_diffusion.export import DIFFUSERS_NAME, FORMATS, KOHYA_NAME, export_adapter

# One set of patterns serves denoisers and text encoders, none of which has all layers that it names.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")

COMPONENT = {"sd": "unet", "sdxl": "unet", "sd3": "transformer", "flux": "transformer"}
WEIGHTS = {"diffusers": DIFFUSERS_NAME, "kohya": KOHYA_NAME}
CASES = [(kind, form) for kind in KINDS for form in FORMATS[COMPONENT[kind]]]
UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
UNET += ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv", "conv_in", "conv_out"]
UNET += ["linear_1", "linear_2"]
JOINT = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
JOINT += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "linear"]
JOINT += ["proj_mlp", "proj_out", "context_embedder", "x_embedder", "proj"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
# Powers of two everywhere, mixed so that no loader gets away with one alpha or one rank for all.
POWERS = {
    "rank_pattern": {"to_k": 8, "conv1": 2, r"ff.net.2": 16, "k_proj": 8, "fc2": 2, "proj_out": 2},
    "alpha_pattern": {
        "to_q": 16,
        "conv1": 1,
        "to_out.0": 2,
        "q_proj": 16,
        "fc1": 1,
        "add_q_proj": 2,
    },
}
# (^proj_out is the one after all blocks, not those in them.)
ODD = {
    "rank_pattern": {"to_k": 3, "conv1": 5, "k_proj": 3, "fc2": 5, "^proj_out": 6, "proj_out": 3},
    "alpha_pattern": {"to_q": 7, "conv2": 1.5, "q_proj": 7, "fc1": 1.5, "add_q_proj": 3},
}
OPTIONS = {
    "powers": {"r": 4, "lora_alpha": 8, **POWERS},
    "odd": {"r": 4, "lora_alpha": 6, **ODD},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, **ODD},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: write_pipeline(root / kind, kind) for kind in KINDS}


def pipeline(folder):
    return DiffusionPipeline.from_pretrained(folder)


def train(model, folder, targets, **options):
    """A LoRA of random numbers on `model`, saved as PEFT does; the model that has it."""
    model = get_peft_model(model, LoraConfig(target_modules=targets, **options))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        elif "lora_magnitude" in name:
            parameter.data.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


def predict(model):
    """The denoiser's output, of an input that is the same for all."""
    model = model.base_model.model if isinstance(model, PeftModel) else model
    kind = DENOISERS[type(model).__name__]
    generator = torch.Generator().manual_seed(5)
    batch = kind.example(model.config)
    filled = {
        n: torch.randn(t.shape, generator=generator).to(model.dtype) for n, t in batch.items()
    }
    filled["timestep"] = torch.full_like(filled["timestep"], 500)
    with torch.no_grad():
        return kind.predict(model, filled)


def encode(model):
    tokens = torch.arange(1, 9).repeat(2, 1) * torch.tensor([[1], [3]])
    with torch.no_grad():
        return model(tokens).last_hidden_state


def injected(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def assert_loaded(model, folder):
    """The model has the folder's layers, no more and no fewer, and each has all of the same effect."""
    found, adapter = injected(model), Adapter.open(str(folder))
    expected = {layer.name: layer for layer in adapter.layers}
    assert set(found) == set(expected)
    for name, module in found.items():
        layer, (active,) = expected[name], module.active_adapters
        down, up = (part[active].weight for part in (module.lora_A, module.lora_B))
        assert torch.equal(down, adapter.read(layer.down_key))
        torch.testing.assert_close(
            module.scaling[active] * up,
            layer.scaling * adapter.read(layer.up_key),
            rtol=1e-6,
            atol=0,
        )


def load_stock(folder, out, form="diffusers"):
    pipe = pipeline(folder)
    more = {"weight_name": KOHYA_NAME} if form == "kohya" else {}
    pipe.load_lora_weights(out, **more)
    return pipe


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kind", "form"), CASES)
def test_stock_pipeline_acts_as_peft(kind, form, options, folders, tmp_path):
    component = COMPONENT[kind]
    targets = UNET if component == "unet" else JOINT
    base = getattr(pipeline(folders[kind]), component)
    every = [m for m in base.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    plain = predict(base)
    trained = train(base, tmp_path, targets, **OPTIONS[options])
    if component == "unet":
        assert len(injected(trained)) == len(every)
    expected = predict(trained)
    assert (expected - plain).abs().max() > 0.1

    written = export_adapter(tmp_path, component, [form], tmp_path / "out")
    assert written == [tmp_path / "out" / WEIGHTS[form]]
    loaded = getattr(load_stock(folders[kind], tmp_path / "out", form), component)
    assert_loaded(loaded, tmp_path)
    torch.testing.assert_close(predict(loaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("kind", "form"), CASES)
def test_text_encoders_go_along(kind, form, options, folders, tmp_path):
    pipe, component = pipeline(folders[kind]), COMPONENT[kind]
    train(getattr(pipe, component), tmp_path, ["to_q", "to_k", "to_v"], r=4, lora_alpha=8)
    encoders = ["text_encoder"] + ["text_encoder_2"] * (kind in ("sdxl", "sd3"))
    for name in encoders:
        train(getattr(pipe, name), tmp_path / name, CLIP, **OPTIONS[options])
    export_adapter(tmp_path, component)
    loaded = load_stock(folders[kind], tmp_path, form)
    assert_loaded(getattr(loaded, component), tmp_path)
    for name in encoders:
        assert len(injected(getattr(loaded, name))) == 3 * len(CLIP)
        assert_loaded(getattr(loaded, name), tmp_path / name)
    changed, plain = encode(loaded.text_encoder), encode(pipeline(folders[kind]).text_encoder)
    torch.testing.assert_close(changed, encode(pipe.text_encoder), rtol=1e-4, atol=1e-5)
    assert (changed - plain).abs().max() > 0.1


def test_published_names(folders, tmp_path):
    """What other programs look for, and what each encoder is called in kohya's layout."""
    sd, sdxl = pipeline(folders["sd"]), pipeline(folders["sdxl"])
    shape = {"r": 4, "lora_alpha": 8}
    for name, pipe in (("sd", sd), ("sdxl", sdxl)):
        train(pipe.unet, tmp_path / name, ["to_q", "to_v"], **shape)
        train(pipe.text_encoder, tmp_path / name / "text_encoder", CLIP, **shape)
        export_adapter(tmp_path / name, "unet")
    first = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    clip = "text_model.encoder.layers.0.self_attn.q_proj"
    published = load_file(tmp_path / "sd" / DIFFUSERS_NAME)
    kohya, kohya_xl = (load_file(tmp_path / name / KOHYA_NAME) for name in ("sd", "sdxl"))
    for name in (f"unet.{first}", f"text_encoder.{clip}"):
        assert f"{name}.lora_A.weight" in published
        assert f"{name}.lora_B.weight" in published
    for prefix, name in (("lora_unet_", first), ("lora_te_", clip)):
        key = prefix + name.replace(".", "_")
        assert kohya[f"{key}.lora_down.weight"].shape[0] == 4
        assert kohya[f"{key}.lora_up.weight"].shape[1] == 4
        assert kohya[f"{key}.alpha"] == 8
        assert kohya[f"{key}.alpha"].shape == ()
    assert any(
        key.startswith("lora_te1_") for key in kohya_xl
    )  # known by its cross-attention's width
    assert not any(key.startswith("lora_te_") for key in kohya_xl)


def effect(tensors, down, up):
    return {
        key.removesuffix(up): tensors[key].double().flatten(1)
        @ tensors[key.removesuffix(up) + down].double().flatten(1)
        for key in tensors
        if key.endswith(up)
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_powers_of_two_lose_nothing_in_half_precision(dtype, folders, tmp_path):
    """A reader of bare tensors, with scaling 1 or kohya's alpha, finds the adapter's own products."""
    train(pipeline(folders["sd"]).unet, tmp_path, UNET, **OPTIONS["powers"])
    path = tmp_path / "adapter_model.safetensors"
    # On a grid, so that half precision has no number that is too small to be halved.
    grid = {name: (t * 1024).round() / 1024 for name, t in load_file(path).items()}
    save_file({name: t.to(dtype) for name, t in grid.items()}, path)
    diffusers, kohya = (load_file(file) for file in export_adapter(tmp_path, "unet"))
    adapter = Adapter.open(str(tmp_path))
    assert {t.dtype for t in diffusers.values()} == {dtype}
    assert {t.dtype for n, t in kohya.items() if not n.endswith(".alpha")} == {dtype}
    plain, scaled = (
        effect(diffusers, ".lora_A.weight", ".lora_B.weight"),
        effect(kohya, ".lora_down.weight", ".lora_up.weight"),
    )
    assert len(plain) == len(scaled) == len(adapter.layers)
    for layer in adapter.layers:
        own = adapter.read(layer.up_key).double().flatten(1)
        own = layer.scaling * own @ adapter.read(layer.down_key).double().flatten(1)
        key = "lora_unet_" + layer.name.replace(".", "_")
        assert torch.equal(plain[f"unet.{layer.name}"], own)
        assert torch.equal(scaled[key] * kohya[f"{key}.alpha"] / layer.rank, own)


def test_bfloat16_is_rounded_once_where_alphas_do_not_fit(folders, tmp_path):
    train(pipeline(folders["sd"]).unet, tmp_path, ["to_q", "to_k"], **OPTIONS["odd"])
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    (file,) = export_adapter(tmp_path, "unet", ["kohya"])
    kohya, adapter = load_file(file), Adapter.open(str(tmp_path))
    alphas = {float(t) for n, t in kohya.items() if n.endswith(".alpha")}
    assert len(alphas) == 1
    for layer in adapter.layers:
        up = kohya["lora_unet_" + layer.name.replace(".", "_") + ".lora_up.weight"].float()
        own = adapter.read(layer.up_key).float()
        torch.testing.assert_close(
            alphas.copy().pop() / layer.rank * up, layer.scaling * own, rtol=2**-8, atol=0
        )


def test_scaling_stays_in_the_header_where_numbers_would_be_lost(folders, tmp_path):
    smallest = 2.0**-24  # of float16
    train(pipeline(folders["sd"]).unet, tmp_path, ["to_q"], r=4, lora_alpha=2)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: torch.full_like(t, smallest).half() for name, t in load_file(path).items()}
    save_file(tensors, path)
    (file,) = export_adapter(tmp_path, "unet", ["diffusers"])
    assert all((t == smallest).all() for t in load_file(file).values())
    loaded = injected(load_stock(folders["sd"], tmp_path).unet).values()
    assert {scaling for module in loaded for scaling in module.scaling.values()} == {0.5}


@pytest.mark.parametrize("kind", KINDS)
def test_dora(kind, folders, tmp_path):
    component = COMPONENT[kind]
    targets = UNET if component == "unet" else JOINT
    base = pipeline(folders[kind])
    options = {**OPTIONS["odd"], "use_dora": True}
    expected = predict(train(getattr(base, component), tmp_path, targets, **options))
    train(base.text_encoder, tmp_path / "text_encoder", CLIP, **options)
    export_adapter(tmp_path, component)
    loaded = load_stock(folders[kind], tmp_path)
    for part, at in ((component, tmp_path), ("text_encoder", tmp_path / "text_encoder")):
        model, adapter = getattr(loaded, part), Adapter.open(str(at))
        assert_loaded(model, at)
        for layer in adapter.layers:
            module = injected(model)[layer.name]
            (magnitude,) = module.lora_magnitude_vector.values()
            assert torch.equal(magnitude.weight, adapter.read(layer.magnitude_key))
    torch.testing.assert_close(predict(getattr(loaded, component)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encode(loaded.text_encoder), encode(base.text_encoder))


def test_dora_in_kohyas_layout(folders, tmp_path):
    """By the formula of its readers: the sum's rows (output channels) get the lengths in dora_scale."""
    base = pipeline(folders["sd"])
    weights = {n: p.clone() for n, p in base.unet.named_parameters()}
    model = train(base.unet, tmp_path, UNET, **OPTIONS["powers"], use_dora=True)
    (file,) = export_adapter(tmp_path, "unet", ["kohya"])
    kohya, merged = load_file(file), model.merge_and_unload()
    names = [layer.name for layer in Adapter.open(str(tmp_path)).layers]
    assert len(kohya) == 4 * len(names)
    for name in names:
        key = "lora_unet_" + name.replace(".", "_")
        down, up, alpha, scale = (
            kohya[f"{key}.{leaf}"]
            for leaf in ("lora_down.weight", "lora_up.weight", "alpha", "dora_scale")
        )
        weight = weights[f"{name}.weight"]
        assert scale.shape == (weight.shape[0], *[1] * (weight.ndim - 1))
        delta = alpha / len(down) * (up.flatten(1) @ down.flatten(1)).view_as(weight)
        lengths = (weight + delta).flatten(1).norm(dim=1).view_as(scale)
        torch.testing.assert_close(
            (weight + delta) * scale / lengths,
            merged.get_submodule(name).weight.data,
            rtol=1e-4,
            atol=1e-5,
        )


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "fc1"], ["fc1", "fc2"]])
def test_kohya_text_encoder_without_out_proj(targets, folders, tmp_path):
    """diffusers knows the layout by out_proj; the export adds one of no effect where it is missing."""
    pipe = pipeline(folders["sd"])
    train(pipe.unet, tmp_path, ["to_q"], r=4, lora_alpha=8)
    train(pipe.text_encoder, tmp_path / "text_encoder", targets, **OPTIONS["odd"])
    export_adapter(tmp_path, "unet")
    loaded = load_stock(folders["sd"], tmp_path, "kohya").text_encoder
    trained = {layer.name for layer in Adapter.open(str(tmp_path / "text_encoder")).layers}
    assert trained == {n for n in injected(loaded) if not n.endswith("out_proj")}
    torch.testing.assert_close(encode(loaded), encode(pipe.text_encoder), rtol=1e-4, atol=1e-5)


def test_names_of_older_transformers(folders, tmp_path):
    """`text_model.` before a text encoder's names, as adapters of earlier versions have it."""
    pipe = pipeline(folders["sd"])
    train(pipe.unet, tmp_path, ["to_q"], r=4, lora_alpha=8)
    inner = tmp_path / "text_encoder"
    train(pipe.text_encoder, inner, CLIP, **OPTIONS["odd"])
    export_adapter(tmp_path, "unet", out=tmp_path / "new")
    path = inner / "adapter_model.safetensors"
    old = {
        n.replace("model.encoder", "model.text_model.encoder"): t
        for n, t in load_file(path).items()
    }
    save_file(old, path)
    assert all("text_model" in name for name in old)
    for new, again in zip(
        sorted((tmp_path / "new").iterdir()),
        sorted(export_adapter(tmp_path, "unet", out=tmp_path / "old")),
    ):
        assert new.read_bytes() == again.read_bytes()


@pytest.fixture
def small(folders, tmp_path):
    train(pipeline(folders["sd"]).unet, tmp_path / "lora", ["to_q"], r=4, lora_alpha=6)
    return tmp_path / "lora"


def test_header_holds_what_tensors_do_not(small):
    (file,) = export_adapter(small, "unet", ("diffusers",))
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert header["unet.lora_alpha"] == 6
    assert header["unet.r"] == 4
    assert all(key.startswith("unet.") for key in header)


def test_alpha_of_zero_is_refused(small):
    config = json.loads((small / "adapter_config.json").read_text())
    (small / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 0}))
    with pytest.raises(CheckpointError, match="the alpha 0, with which a LoRA does nothing"):
        export_adapter(small, "unet")


def test_is_written_whole_or_not_at_all(small, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = sorted(small.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("emloc_diffusion.export.os.fsync", fail)
        with pytest.raises(OutputError, match="disk is full"):
            export_adapter(small, "unet")
    assert sorted(small.iterdir()) == before
    files = export_adapter(small, "unet")
    assert sorted(small.iterdir()) == sorted([*before, *files])


def test_runs_again_and_overwrites_nothing(small):
    files = export_adapter(small, "unet")
    times = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert export_adapter(small, "unet") == files
    assert times == [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    files[1].write_bytes(b"another")
    with pytest.raises(OutputError, match="kohya_lora.safetensors exists"):
        export_adapter(small, "unet")
    assert files[1].read_bytes() == b"another"


def test_formats_of_a_component(folders, small, tmp_path):
    with pytest.raises(ConfigError, match="kohya is written for UNets only"):
        export_adapter(small, "transformer", ("diffusers", "kohya"))
    with pytest.raises(ConfigError, match="No format onnx"):
        export_adapter(small, "unet", ("onnx",))
    with pytest.raises(ConfigError, match="No component vae"):
        export_adapter(small, "vae")
    train(pipeline(folders["sd3"]).transformer, tmp_path / "sd3", ["to_q"], r=4, lora_alpha=6)
    assert [file.name for file in export_adapter(tmp_path / "sd3", "transformer")] == [
        DIFFUSERS_NAME
    ]


def test_refuses_what_cannot_be_said(folders, small, tmp_path):
    config = small / "adapter_config.json"
    tensors = load_file(small / "adapter_model.safetensors")
    text = config.read_text()

    def changed(tensors, **options):
        config.write_text(json.dumps({**json.loads(text), **options}))
        save_file(tensors, small / "adapter_model.safetensors")

    changed(
        {**tensors, "base_model.model.conv_in.bias": torch.ones(3)}, modules_to_save=["conv_in"]
    )
    with pytest.raises(MismatchError, match=r"conv_in\.bias, trained whole"):
        export_adapter(small, "unet")
    first = next(name for name in tensors if "lora_A" in name)
    key = first.replace(".lora_A.weight", ".lora_magnitude_vector")
    changed({**tensors, key: torch.ones(24)}, use_dora=True)
    with pytest.raises(CheckpointError, match="no .*lora_magnitude_vector; it is incomplete"):
        export_adapter(small, "unet")
    changed({name.replace("attn1.to_q", "attn1.to_z"): t for name, t in tensors.items()})
    with pytest.raises(MismatchError, match=r"no name for unet\..*attn1\.to_z"):
        export_adapter(small, "unet")
    assert not (small / DIFFUSERS_NAME).exists()
    large = {name: torch.full_like(t, 60000).half() for name, t in tensors.items()}
    changed(large, alpha_pattern={"mid_block.*attn1.to_q": 6 * math.pi})
    with pytest.raises(NumericalError, match=r"does not fit torch\.float16"):
        export_adapter(small, "unet")
    changed(tensors)
    train(pipeline(folders["flux"]).text_encoder_2, small / "text_encoder_2", ["q"], r=4)
    with pytest.raises(MismatchError, match="not a layer of CLIP's text encoder"):
        export_adapter(small, "unet")
    shutil.rmtree(small / "text_encoder_2")
    assert len(export_adapter(small, "unet")) == 2
    with pytest.raises(CheckpointError, match="No folder"):
        export_adapter(tmp_path / "missing", "unet")
