"""A model in one file of the original layout is, to every stage, the pipeline that it was written from."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline
from original_files import write_original
from safetensors.torch import load_file, save_file

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.manifest import Manifest
from emloc.errors import CheckpointError
from emloc.extend.opening import open_model
from emloc.extend.plugins import load_plugins
from emloc_diffusion.example import write_pictures
from emloc_diffusion.example_pipelines import RESOLUTION, write_pipeline

NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMLOC_CACHE", str(folder))
        yield folder


def made_of(root, kind, dtype=torch.float32):
    native = write_pipeline(root / kind, kind, seed=1, dtype=dtype)
    pipeline = DiffusionPipeline.from_pretrained(native, torch_dtype=dtype)
    if kind == "sd3":  # its files hold no projection of the first encoder
        width = pipeline.text_encoder.config.projection_dim
        pipeline.text_encoder.text_projection.weight.data.copy_(torch.eye(width))
        pipeline.save_pretrained(native)
    configuration = root / f"{kind}-configuration"
    shutil.copytree(native, configuration, ignore=shutil.ignore_patterns("*.safetensors"))
    file = write_original(pipeline, kind, root / f"{kind}.safetensors")
    return SimpleNamespace(native=native, file=file, configuration=configuration, pipeline=pipeline)


@pytest.fixture(scope="module")
def sd(tmp_path_factory, cache):
    return made_of(tmp_path_factory.mktemp("sd"), "sd")


def all_tensors(folder):
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.parent.name}.{k}": t for k, t in load_file(path).items()}
    return found


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_every_tensor_is_read_back(kind, tmp_path, cache, sd):
    made = sd if kind == "sd" else made_of(tmp_path, kind)
    model, family = open_model(made.file, str(made.configuration))
    assert family.name == "diffusion"
    assert (model.name, model.digest()) == (str(made.file), Checkpoint.open(made.native).digest())
    ours, theirs = all_tensors(model.path), all_tensors(made.native)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name
    assert DiffusionPipeline.from_pretrained(model.path).scheduler.config == (
        DiffusionPipeline.from_pretrained(made.native).scheduler.config
    )


def test_parts_keep_their_dtypes(sd, tmp_path, cache):
    """Half precision weights beside a float32 VAE, whatever else the file keeps in float32."""
    tensors = {
        name: tensor if name.startswith("first_stage_model") or "." not in name else tensor.half()
        for name, tensor in load_file(sd.file).items()
    }
    save_file(tensors, tmp_path / "half.safetensors")
    model, _ = open_model(tmp_path / "half.safetensors", str(sd.configuration))
    found = all_tensors(model.path)
    kinds = {name.split(".")[0]: tensor.dtype for name, tensor in found.items()}
    assert kinds == {
        "unet": torch.float16, "text_encoder": torch.float16, "vae": torch.float32,
    }  # fmt: skip
    for name, tensor in all_tensors(sd.native).items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.long
def test_all_stages_give_the_bytes_of_the_native_folder(sd, tmp_path, cache):
    pictures = {
        "dataset": str(write_pictures(tmp_path / "pictures", 3, seed=2)),
        "instance_prompt": "a photo of sks square", "resolution": RESOLUTION,
    }  # fmt: skip
    made = {}
    for name, model in (("native", sd.native), ("file", sd.file)):
        if name == "file":
            pictures["memory"] = "1GiB"  # planned from one file as well, and nothing changes
        named = {"model_name_or_path": str(model)}
        config = {"single_file_config": str(sd.configuration)} if name == "file" else {}
        root = tmp_path / name
        emulator = emloc.compress(
            output_dir=root / "emulator", format="low_rank", keep_ratio=0.5,
            num_calibration_samples=4, **pictures, **named, **config,
        )  # fmt: skip
        train = {"max_train_steps": 1, "learning_rate": 1e-2, "lora_r": 3}
        adapter = emloc.train(
            emulator=str(emulator), output_dir=root / "adapter", **train, **pictures
        )
        # Nobody says again where the configuration is: manifests know.
        corrected = emloc.correct(
            adapter=str(adapter), emulator=str(emulator), output_dir=root / "corrected",
            num_calibration_samples=4, **pictures,
        )  # fmt: skip
        memory = {"memory": pictures.pop("memory")} if name == "file" else {}
        merged = emloc.merge(adapter=str(corrected), output_dir=root / "merged", **memory)
        on_base = emloc.train(output_dir=root / "lora", **named, **config, **train, **pictures)
        merged_lora = emloc.merge(adapter=str(on_base), output_dir=root / "merged-lora")
        scores = emloc.evaluate(
            adapter=str(corrected), num_noise_samples=4, **named, **config, **pictures
        )
        assert emloc.verify(path=emulator)["kind"] == "emulator"
        assert emloc.verify(path=corrected)["base_model"] == str(model)
        for path in (emulator, corrected, merged, on_base):
            reference = Manifest.read(path).base_model
            assert reference.name_or_path == str(model)
            assert reference.single_file_config == config.get("single_file_config")
        folders = (emulator, adapter, corrected, merged, on_base, merged_lora)
        made[name] = [path for folder in folders for path in sorted(folder.rglob("*.safetensors"))]
        made[name, "loss"] = scores["loss"]
    assert len(made["native"]) == len(made["file"]) > 10
    for ours, theirs in zip(made["file"], made["native"]):
        assert ours.read_bytes() == theirs.read_bytes(), ours
    assert made["file", "loss"] == made["native", "loss"]


def test_converted_once_for_each_content(sd, tmp_path, cache, monkeypatch):
    first, _ = open_model(sd.file, str(sd.configuration))
    reader = load_plugins().families["diffusion"].load_single_file()
    written = []
    monkeypatch.setattr(type(reader), "write", lambda *a: written.append(a))
    moved = shutil.copy(sd.file, tmp_path / "sd.safetensors")
    again, _ = open_model(moved, str(sd.configuration))
    assert (again.path, written) == (first.path, [])
    monkeypatch.undo()
    other = shutil.copytree(sd.configuration, tmp_path / "other")
    index = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    index["prediction_type"] = "v_prediction"
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(index))
    changed, _ = open_model(sd.file, str(other))
    assert changed.path != first.path
    scheduler = json.loads((changed.path / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"


def test_a_conversion_that_is_cut_off_leaves_nothing(sd, tmp_path, monkeypatch):
    monkeypatch.setenv("EMLOC_CACHE", str(tmp_path / "cache"))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("emloc.extend.single_file.sync_tree", stop)
        with pytest.raises(KeyboardInterrupt):
            open_model(sd.file, str(sd.configuration))
    left = [path for path in (tmp_path / "cache").rglob("*") if path.suffix != ".lock"]
    assert left == [tmp_path / "cache" / "single-files"]
    open_model(sd.file, str(sd.configuration))


def test_what_the_file_lacks_is_lent_by_the_folder(sd, tmp_path, cache):
    alone = write_original(
        sd.pipeline, "sd", tmp_path / "unet.safetensors", without=("vae", "text_encoder")
    )
    model, _ = open_model(alone, str(sd.native))
    theirs = all_tensors(sd.native)
    assert all(torch.equal(t, theirs[name]) for name, t in all_tensors(model.path).items())
    with pytest.raises(CheckpointError, match="text_encoder, which unet.safetensors lacks, cannot"):
        open_model(alone, str(sd.configuration))


def test_bad_input_is_one_sentence(sd, tmp_path, cache):
    def refused(match, path, config=str(sd.configuration)):
        with pytest.raises(CheckpointError, match=match) as found:
            emloc.compress(
                model_name_or_path=str(path), single_file_config=config, output_dir=tmp_path / "x",
                dataset="none",
            )  # fmt: skip
        assert "\n" not in str(found.value)

    pickled = tmp_path / "model.ckpt"
    pickled.write_bytes(b"\x80\x02cos\nsystem\n")
    refused("is a pickle, which can run code", pickled)
    (tmp_path / "notes.txt").write_text("no model")
    refused("pass the model's folder", tmp_path / "notes.txt")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(sd.file.read_bytes()[:-100])
    refused("incomplete or corrupt", broken)
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    refused(
        "not a single-file model that an installed family knows", tmp_path / "other.safetensors"
    )
    tensors = load_file(sd.file)
    half = {k: t for k, t in tensors.items() if "output_blocks" not in k}
    save_file(half, tmp_path / "half.safetensors")
    refused("lacks a tensor that the configuration", tmp_path / "half.safetensors")
    half = {k: t for k, t in tensors.items() if ".layers.1." not in k}
    save_file(half, tmp_path / "text.safetensors")
    refused("lacks encoder.layers.1.* of the text_encoder", tmp_path / "text.safetensors")
    narrow = {k: t[:, :1] if k.endswith("attn1.to_k.weight") else t for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in narrow.items()}, tmp_path / "narrow.safetensors")
    refused("expected shape.*configuration of its kind", tmp_path / "narrow.safetensors")
    quantised = {
        k: t.to(torch.float8_e4m3fn) if "middle_block" in k else t for k, t in tensors.items()
    }
    save_file(quantised, tmp_path / "float8.safetensors")
    refused("is quantised", tmp_path / "float8.safetensors")
    refused("has no model_index.json", sd.file, config=str(tmp_path))
    # Offline, diffusers' guess is not to be had; the sentence says what was guessed.
    refused("stable-diffusion-v1-5.*pass single_file_config", sd.file, config=None)
    assert not (tmp_path / "x").exists()
