"""Pipelines of diffusers through the stages, against dense float64 and stock loaders."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import PeftModel
from safetensors.torch import load_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.config import CompressConfig
from emloc.errors import ConfigError, MismatchError
from emloc.extend.plugin_options import with_plugin_options
from emloc_diffusion.denoisers import denoiser_of
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import RESOLUTION, write_pipeline
from emloc_diffusion.family import DiffusionFamily
from emloc_diffusion.loading import load_denoiser

KINDS = ("sd", "sdxl", "sd3", "flux")
PROMPT = "a photo of sks square"


def batches_of(base, options):
    config = with_plugin_options(CompressConfig)(
        model_name_or_path=str(base), output_dir="unused", **options
    )
    return DiffusionFamily().calibration_batches(Checkpoint.open(base), config)


def predict(model, batch, base):
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        given = {name: tensor.to(dtype) for name, tensor in batch.items()}
        return denoiser_of(Checkpoint.open(base)).predict(model, given)


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    base = write_pipeline(root / "base", request.param, seed=1)
    data = {
        "dataset": str(write_pictures(root / "pictures", 4, seed=2)), "instance_prompt": PROMPT,
        "resolution": RESOLUTION, "calibration_batch_size": 4, "num_calibration_samples": 8,
    }  # fmt: skip
    emulator = emloc.compress(
        model_name_or_path=str(base),
        output_dir=root / "emulator",
        format="low_rank",
        keep_ratio=0.5,
        **data,
    )
    pictures = {name: data[name] for name in ("dataset", "instance_prompt", "resolution")}
    train = {
        "emulator": str(emulator), "max_train_steps": 4, "save_steps": 2, "logging_steps": 1,
        "train_batch_size": 2, "learning_rate": 1e-2, "lora_r": 3, "lora_alpha": 5,
        "lora_conv": True, **pictures,
    }  # fmt: skip
    adapter = emloc.train(output_dir=root / "adapter", **train)
    corrected = emloc.correct(
        adapter=str(adapter), emulator=str(emulator), output_dir=root / "corrected", limit="none",
        **data,
    )  # fmt: skip
    return SimpleNamespace(kind=request.param, root=root, base=base, data=data, train=train,
                           emulator=emulator, adapter=adapter, corrected=corrected)  # fmt: skip


def seen_outputs(model, names, batches, base):
    """What each layer writes without its bias, float64, one row per token or pixel."""
    found = {name: [] for name in names}

    def hook(name):
        def record(module, _, output):
            y = output if module.bias is None else (
                output - module.bias.view(-1, 1, 1) if output.ndim == 4 else output - module.bias
            )  # fmt: skip
            rows = y.movedim(1, -1) if isinstance(module, torch.nn.Conv2d) else y
            found[name].append(rows.reshape(-1, rows.shape[-1]).double())

        return record

    handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in names]
    for batch in batches:
        predict(model, batch, base)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_every_layer_is_the_optimum(made):
    """Of linear layers and convolutions: the error is that of the best rank-k stand-in, in float64."""
    checkpoint = Checkpoint.open(made.base)
    model = load_denoiser(checkpoint, "float32", "cpu").double()
    emulator = load_denoiser(Checkpoint.open(made.emulator), "float32", "cpu")
    layers = Manifest.read(made.emulator).layers
    alone = {n: e for n, e in layers.items() if len(e["layers"]) == 1}
    seen = seen_outputs(model, alone, batches_of(made.base, made.data), made.base)
    kinds = set()
    for name, entry in alone.items():
        spectrum = torch.linalg.svdvals(seen[name])
        best = (spectrum[entry["rank"] :].square().sum() / spectrum.square().sum()).sqrt()
        assert entry["relative_error"] == pytest.approx(float(best), rel=2e-3, abs=1e-4), name
        # And the stored factors are that stand-in: the weight on the outputs' leading directions.
        weight = model.get_submodule(name).weight.flatten(1)
        left = emulator.get_submodule(name).left.double().flatten(1)
        stored = emulator.get_submodule(name).weight.double().reshape(weight.shape)
        q = torch.linalg.qr(left)[0]
        torch.testing.assert_close(stored, q @ (q.T @ weight), rtol=1e-3, atol=1e-4)
        missed = (seen[name] - seen[name] @ q @ q.T).norm() / seen[name].norm()
        assert float(missed) == pytest.approx(float(best), rel=2e-3, abs=1e-4), name
        kinds.add(type(model.get_submodule(name)).__name__)
    assert kinds == ({"Linear", "Conv2d"} if made.kind in ("sd", "sdxl") else {"Linear"})


def test_emulator_is_a_stock_pipeline(made):
    pipeline = DiffusionPipeline.from_pretrained(made.emulator)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a square", num_inference_steps=2, height=RESOLUTION, width=RESOLUTION,
                       output_type="pt").images  # fmt: skip
    assert bool(torch.isfinite(torch.as_tensor(picture)).all())
    left = [n for n, _ in getattr(pipeline, made_component(made)).named_parameters() if "left" in n]
    assert len(left) == sum(len(e["layers"]) for e in Manifest.read(made.emulator).layers.values())


def made_component(made):
    return Checkpoint.open(made.base).layout.folder.rstrip("/")


def test_corrected_adapter_acts_as_the_emulator_did(made):
    """On the subspace that A reads, with convolutions as matrices; A itself is unchanged."""
    base = load_denoiser(Checkpoint.open(made.base), "float32", "cpu")
    emulator = load_denoiser(Checkpoint.open(made.emulator), "float32", "cpu")
    before = load_file(made.adapter / "adapter_model.safetensors")
    after = load_file(made.corrected / "adapter_model.safetensors")
    scaling, checked = 5 / 3, 0
    for key in (key for key in before if "lora_A" in key):
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        up = key.replace("lora_A", "lora_B")
        assert torch.equal(before[key], after[key])
        a = before[key].flatten(1).double()
        ours = base.get_submodule(name).weight.flatten(1).double()
        ours = ours + scaling * after[up].flatten(1).double() @ a
        weight = emulator.get_submodule(name).weight
        theirs = weight.reshape(weight.shape[0], -1).double()
        theirs = theirs + scaling * before[up].flatten(1).double() @ a
        torch.testing.assert_close(ours @ a.T, theirs @ a.T, rtol=1e-3, atol=1e-3)
        checked += 1
    assert checked == sum(len(e["layers"]) for e in Manifest.read(made.emulator).layers.values())


def test_stock_diffusers_draws_the_same_as_peft(made):
    """`load_lora_weights` on the original pipeline: the denoiser predicts what PEFT's model predicts."""
    [batch, *_] = batches_of(made.base, made.data)
    base = load_denoiser(Checkpoint.open(made.base), "float32", "cpu")
    plain = predict(base, batch, made.base)
    tuned = PeftModel.from_pretrained(base, made.corrected).eval()
    expected = predict(tuned, batch, made.base)
    pipeline = DiffusionPipeline.from_pretrained(made.base)
    pipeline.load_lora_weights(made.corrected)
    model = getattr(pipeline, made_component(made))
    torch.testing.assert_close(predict(model, batch, made.base), expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_merged_is_a_pipeline_that_predicts_the_same(made):
    merged = emloc.merge(adapter=str(made.corrected), output_dir=made.root / "merged")
    [batch, *_] = batches_of(made.base, made.data)
    tuned = PeftModel.from_pretrained(
        load_denoiser(Checkpoint.open(made.base), "float32", "cpu"), made.corrected
    ).eval()
    pipeline = DiffusionPipeline.from_pretrained(merged)
    model = getattr(pipeline, made_component(made))
    torch.testing.assert_close(
        predict(model, batch, made.base), predict(tuned, batch, made.base), rtol=1e-3, atol=1e-4
    )
    assert emloc.verify(path=merged)["kind"] == "merged_model"


def test_training_resumes_exactly(made, monkeypatch):
    from emloc.integrations.transformers import lora_training

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lora_training, "plot_loss", stop)
        with pytest.raises(KeyboardInterrupt):
            emloc.train(output_dir=made.root / "again", **made.train)
    partial = made.root / "again.partial"
    for stale in ("adapter_model.safetensors", "adapter_config.json"):
        (partial / stale).unlink(missing_ok=True)
    again = emloc.train(output_dir=made.root / "again", **made.train)
    ours = load_file(again / "adapter_model.safetensors")
    for name, tensor in load_file(made.adapter / "adapter_model.safetensors").items():
        assert torch.equal(ours[name], tensor)


def test_compressible_layers(tiny):
    """Resnets, attention and feed-forward are compressed; what reads time, pixels or nothing else stays."""
    family, checkpoint = DiffusionFamily(), Checkpoint.open(tiny.base)
    model = family.skeleton(checkpoint, torch.float32)
    names = {name for group in family.layer_groups(model) for name in group}
    assert "down_blocks.0.resnets.0.conv1" in names
    assert "up_blocks.1.attentions.0.proj_in" in names
    assert "down_blocks.0.downsamplers.0.conv" in names
    assert not any("time_emb" in name or name in ("conv_in", "conv_out") for name in names)
    order = list(family.blocks(model))
    assert order.index("down_blocks.0.resnets.0") < order.index("mid_block.resnets.0")
    assert order.index("mid_block.resnets.1") < order.index("up_blocks.0.resnets.0")


def test_an_adapter_of_another_unet_is_refused(tiny, tmp_path):
    other = write_pipeline(tmp_path / "other", "sd", seed=0, block_out_channels=(16, 24))
    adapter = emloc.train(
        model_name_or_path=str(other), output_dir=tmp_path / "a", max_train_steps=1,
        instance_data_dir=str(tiny.pictures), instance_prompt=PROMPT, resolution=RESOLUTION,
    )  # fmt: skip
    with pytest.raises(MismatchError, match="another"):
        emloc.evaluate(
            model_name_or_path=str(tiny.base), adapter=str(adapter), dataset=str(tiny.pictures),
            instance_prompt=PROMPT, resolution=RESOLUTION,
        )  # fmt: skip
    with pytest.raises(MismatchError):
        emloc.merge(
            adapter=str(adapter), model_name_or_path=str(tiny.base), output_dir=tmp_path / "m"
        )


def test_layers_kept_dense_are_named_and_may_be_included(tiny, tmp_path):
    options = {
        "model_name_or_path": str(tiny.base), "instance_data_dir": str(tiny.pictures),
        "instance_prompt": PROMPT, "resolution": RESOLUTION, "num_calibration_samples": 4,
    }  # fmt: skip
    plain = Manifest.read(emloc.compress(output_dir=tmp_path / "plain", **options))
    assert plain.kept_dense["conv_in"] == "it embeds pixels, time or text, or makes the output"
    modulation = "down_blocks.0.resnets.0.time_emb_proj"
    assert plain.kept_dense[modulation] == "it reads the timestep alone"
    whole = Manifest.read(
        emloc.compress(output_dir=tmp_path / "all", include=["time_emb_proj"], **options)
    )
    assert modulation in whole.layers
    assert modulation not in whole.kept_dense
    with pytest.raises(ConfigError, match="conv_in is in no block"):
        emloc.compress(output_dir=tmp_path / "x", include=["conv_in"], **options)
    with pytest.raises(ConfigError, match="include: 'nothing' matches no layer"):
        emloc.compress(output_dir=tmp_path / "x", include=["nothing"], **options)


def test_a_folder_of_pictures_may_be_spelt_in_any_way(tiny, tmp_path, monkeypatch):
    """A trailing slash, the name `dataset`, another place: only the pictures in the folder count."""
    options = {
        "model_name_or_path": str(tiny.base), "output_dir": tmp_path / "a", "max_train_steps": 1,
        "instance_prompt": PROMPT, "resolution": RESOLUTION, "lora_r": 2, "device": "cpu",
    }  # fmt: skip
    monkeypatch.chdir(tiny.pictures.parent)
    name = tiny.pictures.name
    made = emloc.train(instance_data_dir=f"./{name}/", **options)
    before = (made / "emloc.json").read_bytes()
    shutil.copytree(tiny.pictures, tmp_path / "moved")
    for spelt in (name, str(tiny.pictures), str(tmp_path / "moved")):
        emloc.train(instance_data_dir=spelt, **options)
        emloc.train(dataset=spelt, **options)
    emloc.train(dataset=f"{name}/", instance_data_dir=name, **options)
    assert (made / "emloc.json").read_bytes() == before
    with pytest.raises(ConfigError, match="mean the same; give one of them"):
        emloc.train(dataset=str(tmp_path / "moved"), instance_data_dir=name, **options)
