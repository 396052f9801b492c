"""A pipeline's folder: which weights each library reads in it, and what its index may name."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

import emloc
from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError
from emloc_diffusion.drawing import load_pipeline
from emloc_diffusion.encode.components import read_model_index
from emloc_diffusion.encode.latents import encode_latents
from emloc_diffusion.encode.text import PromptEncoder
from emloc_diffusion.example_pipelines import write_pipeline


@pytest.fixture
def pipeline(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny.base, tmp_path / "downloads" / "pipeline"))


def two_sets(pipeline: Path, component: str, other: Path, kind: type) -> None:
    """Put the other pipeline's weights of a component, in shards, beside its own single file."""
    model = kind.from_pretrained(other / component)
    sharded = other / f"{component}-shards"
    model.save_pretrained(sharded, max_shard_size="50KB")
    assert list(sharded.glob("*.index.json"))
    for file in sharded.glob("*.safetensors*"):
        shutil.copy(file, pipeline / component)


@pytest.mark.parametrize(
    ("component", "kind"),
    [("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel), ("vae", AutoencoderKL)],
)
def test_each_component_is_what_its_library_reads(pipeline, tmp_path, component, kind):
    other = write_pipeline(tmp_path / "other", "sd", seed=9)
    before = kind.from_pretrained(pipeline / component).state_dict()
    two_sets(pipeline, component, other, kind)
    stock = kind.from_pretrained(pipeline / component).state_dict()
    name = next(n for n, t in stock.items() if t.is_floating_point() and t.ndim > 1)
    took_shards = kind is not CLIPTextModel  # diffusers looks for an index first, transformers last
    assert torch.equal(stock[name], before[name]) != took_shards
    opened = Checkpoint.open(pipeline)
    found = opened if component == "unet" else opened.part(component)
    stored = name if name in found.tensors else f"text_model.{name}"
    assert torch.equal(found.read(stored), stock[name])


def test_a_variant_alone_is_named(pipeline):
    file = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(CheckpointError, match="only the variant diffusion_pytorch_model.fp16"):
        Checkpoint.open(pipeline)


def add_component(pipeline: Path, name: str) -> None:
    index = json.loads((pipeline / "model_index.json").read_text())
    index[name] = ["transformers", "X"]
    (pipeline / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../victim", "unet/../../victim", "..", ".", "a/b", "..\\victim"])
def test_components_outside_are_refused_and_nothing_there_changes(tiny, pipeline, tmp_path, name):
    """An index that names `../victim` must neither copy from there nor write beside the output."""
    (pipeline.parent / "victim").mkdir()
    (pipeline.parent / "victim" / "keys").write_text("theirs")
    home = tmp_path / "home"
    (home / "victim").mkdir(parents=True)
    (home / "victim" / "keys").write_text("mine")
    (home / "victim" / "keys").chmod(0o600)
    add_component(pipeline, name)
    with pytest.raises(CheckpointError, match="not a plain folder name"):
        emloc.compress(
            model_name_or_path=str(pipeline), output_dir=home / "out", dataset=str(tiny.pictures),
            instance_prompt="a photo of sks square", resolution=64,
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="not a plain folder name"):
        read_model_index(pipeline)
    assert (home / "victim" / "keys").read_text() == "mine"
    assert (home / "victim" / "keys").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in home.iterdir()) == ["victim"]


def test_absolute_components_are_refused(pipeline, tmp_path):
    (tmp_path / "private").mkdir()
    add_component(pipeline, str(tmp_path / "private"))
    with pytest.raises(CheckpointError, match="not a plain folder name"):
        Checkpoint.open(pipeline)


def test_a_component_that_is_a_link_out_is_refused(pipeline, tmp_path):
    shutil.move(pipeline / "tokenizer", tmp_path / "tokenizer")
    (pipeline / "tokenizer").symlink_to(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer is a link that leads out of"):
        Checkpoint.open(pipeline)


def test_a_file_of_a_component_that_is_a_link_out_is_refused(pipeline, tmp_path):
    (tmp_path / "secret").write_text("s")
    (pipeline / "tokenizer" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"notes.txt is a link that leads out of"):
        Checkpoint.open(pipeline)


def test_a_pipe_in_a_component_is_not_copied(pipeline):
    os.mkfifo(pipeline / "tokenizer" / "pipe.txt")
    assert "tokenizer/pipe.txt" not in Checkpoint.open(pipeline).companions()


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_that_lacks_a_tensor_is_refused_wherever_it_is_loaded(tmp_path, part):
    """Libraries draw it at random, and only their log says so."""
    folder = write_pipeline(tmp_path / "model", "sd")
    [file] = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    lost = next(name for name in tensors if name.endswith("weight") and tensors[name].ndim == 2)
    del tensors[lost]
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    loads = [lambda: load_pipeline(folder)]
    if part == "vae":
        loads.append(lambda: encode_latents(folder, torch.zeros(1, 3, 64, 64)))
    else:
        loads.append(lambda: PromptEncoder(folder))
    for load in loads:
        with pytest.raises(
            CheckpointError, match=rf"{part} holds no tensor for .*initialised at random"
        ):
            load()


def test_a_part_of_a_million_blocks_is_refused_before_it_is_built(tmp_path):
    folder = write_pipeline(tmp_path / "model", "sd")
    for part, name in (("vae", "layers_per_block"), ("text_encoder", "num_hidden_layers")):
        path = folder / part / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, name: 10**6}))
        with pytest.raises(CheckpointError, match=rf"{name} = 1000000 asks for more blocks"):
            load_pipeline(folder)
        path.write_text(json.dumps(config))
