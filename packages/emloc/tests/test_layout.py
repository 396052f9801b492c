"""Names of a checkpoint's files."""

import json

import pytest
import torch
from safetensors.torch import save_file

from emloc.artefacts.checkpoint import Checkpoint
from emloc.artefacts.layout import Layout, layout_of
from emloc.errors import CheckpointError


@pytest.fixture
def pipeline(tmp_path):
    index = {
        "_class_name": "Pipeline", "vae": ["diffusers", "AutoencoderKL"], "noise": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"], "text": ["transformers", "CLIPTextModel"],
        "core": ["diffusers", "Some2DModel"],
    }  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for folder in ("core", "vae", "text", "logs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"a": 1}')
    (tmp_path / "text" / "pytorch_model.bin").write_bytes(b"pickle")
    return tmp_path


def test_a_plain_folder(tmp_path):
    assert layout_of(tmp_path) == Layout()
    assert Layout().single == "model.safetensors"
    assert Layout().shards(2)[1] == "model-00002-of-00002.safetensors"


def test_a_pipeline(pipeline):
    layout = layout_of(pipeline)
    assert layout.config == "core/config.json"
    assert layout.index == "core/diffusion_pytorch_model.safetensors.index.json"
    assert (
        layout.inside(layout.shards(3)[0]) == "diffusion_pytorch_model-00001-of-00003.safetensors"
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_and_companions_of_a_pipeline(pipeline, sharded):
    layout = layout_of(pipeline)
    file = layout.shards(1)[0] if sharded else layout.single
    save_file({"w": torch.ones(2, 3)}, pipeline / file)
    if sharded:
        weight_map = {"w": layout.inside(file)}
        (pipeline / layout.index).write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(pipeline)
    assert torch.equal(checkpoint.read("w"), torch.ones(2, 3))
    assert checkpoint.config == {"a": 1}
    # Neither what is no component, nor pickles.
    assert checkpoint.companions() == ["model_index.json", "text/config.json", "vae/config.json"]
    before = checkpoint.companions_digest()
    (pipeline / "vae/config.json").write_text('{"a": 2}')
    assert checkpoint.companions_digest() != before


def test_missing_weights_of_a_pipeline(pipeline):
    with pytest.raises(
        CheckpointError, match="core holds no safetensors weights: expected diffusion_"
    ):
        Checkpoint.open(pipeline)
