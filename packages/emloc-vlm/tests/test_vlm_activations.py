"""A training step of an InternVL in closed form against the same step counted."""

import json
from pathlib import Path

import pytest
import torch

import emloc
from emloc.artefacts.described import Described
from emloc.compression.groups import Group, group_shape
from emloc.config import TrainConfig
from emloc.errors import ConfigError
from emloc.extend.plugin_options import with_plugin_options
from emloc.formats.low_rank import low_rank
from emloc.formats.low_rank_sizes import rank_for
from emloc.planning.described import describe
from emloc.planning.family import traced_loss
from emloc.planning.layers import layer_shapes, planned_layers
from emloc.planning.step import Precision, StepOptions
from emloc.planning.trace import count_step, materialise, trace_step
from emloc_vlm.example import write_model

OPTIONS = with_plugin_options(TrainConfig)
ITEM = {"float32": 4, "bfloat16": 2}
TEXT = {"hidden_size": 96, "intermediate_size": 272, "num_attention_heads": 6, "head_dim": 16,
        "num_key_value_heads": 2, "num_hidden_layers": 3}  # fmt: skip
VISION = {"hidden_size": 80, "intermediate_size": 168, "num_attention_heads": 5,
          "num_hidden_layers": 3, "image_size": [32, 32]}  # fmt: skip
TOWERS = {  # as the vision towers of 300M and of 6B parameters
    "layer": {"use_mean_pooling": True},
    "rms": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False,
            "use_mean_pooling": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    made = {}
    for kind, more in TOWERS.items():
        folder = write_model(tmp_path_factory.mktemp(kind), vision={**VISION, **more}, text=TEXT)
        (folder / "model.safetensors").unlink()
        config = json.loads((folder / "config.json").read_text())
        config["image_seq_length"] = 16
        (folder / "config.json").write_text(json.dumps(config))
        made[kind] = describe(str(folder))[:2]
    return made


def options(dtype="float32", twice=False, seen=False, **more):
    return OPTIONS(
        output_dir="unused", dtype=dtype, gradient_checkpointing=twice, lora_r=5,
        freeze_vision_tower=not seen, freeze_multi_modal_projector=not seen,
        **{"max_length": 57, **more},
    )  # fmt: skip


def both(checkpoint, family, config, compressed, run, samples=2):
    """Largest moments in closed form and as `run` counts them."""
    skeleton = family.skeleton(checkpoint, torch.float32)
    shapes = layer_shapes(skeleton)
    shaped = [group_shape(names, shapes.__getitem__) for names in family.layer_groups(skeleton)]
    groups = [Group(shape, low_rank(rank_for(0.4, shape.rows, shape.d_in))) for shape in shaped]
    groups = groups if compressed else []
    batch = family.planned_batch(checkpoint, config, samples)
    adapted = family.adapted_layers(skeleton, config)
    layers = planned_layers(skeleton, shapes, groups, adapted, config)
    step = StepOptions(Precision(ITEM[config.dtype]), config.gradient_checkpointing)
    planned = family.step_sizes(skeleton, layers, batch, step)
    model = family.trainable(checkpoint, groups, config)
    return planned.largest.total, run(model, batch, family, checkpoint).largest.total


def real(model, batch, family, checkpoint):
    materialise(model)
    made = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in batch.items()}
    samples, pictures = len(made["input_ids"]), len(made["pixel_values"])
    tokens = pictures // samples * checkpoint.config["image_seq_length"]
    made["input_ids"][:, 1 : 1 + tokens] = checkpoint.config["image_token_id"]
    if samples > 1:
        made["attention_mask"][:, :-3] = 1
    return count_step(model, made, traced_loss(family), autocast=False)


def traced(model, batch, family, checkpoint):
    return trace_step(model, batch, traced_loss(family), autocast=False)


SETTINGS = [("float32", False, False, False), ("float32", True, True, False),
            ("float32", True, False, True), ("bfloat16", False, True, True),
            ("bfloat16", True, False, False), ("bfloat16", True, True, True)]  # fmt: skip
"""dtype, gradient checkpointing, LoRA on the vision tower, low-rank."""


@pytest.mark.parametrize(
    ("kind", "dtype", "twice", "seen", "compressed"),
    [*(("layer", *s) for s in SETTINGS[:4]), *(("rms", *s) for s in SETTINGS[1::2])],
)
def test_closed_form_is_the_real_step(described, kind, dtype, twice, seen, compressed):
    """Also with a LoRA on vision tower and projector."""
    config = options(dtype, twice, seen)
    planned, counted = both(*described[kind], config, compressed, real)
    assert planned == pytest.approx(counted, rel=0.03)


def test_trace_and_one_sample(described):
    for twice, run, samples in ((False, traced, 2), (False, real, 1), (True, real, 1)):
        planned, counted = both(*described["layer"], options(twice=twice), True, run, samples)
        assert planned == pytest.approx(counted, rel=0.02)


def test_as_many_tiles_as_fit_in_the_tokens(described):
    checkpoint, family = described["layer"]

    def tiles(**more):
        return len(family.planned_batch(checkpoint, options(**more), 1)["pixel_values"])

    assert tiles(max_length=57) == 3  # 16 tokens each, and one for the answer
    assert tiles(max_length=16 * 40) == 13  # twelve and the thumbnail
    assert tiles(max_length=16 * 40, max_dynamic_patch=4) == 5
    assert tiles(max_length=16 * 40, max_dynamic_patch=1) == 1
    with pytest.raises(ConfigError, match="leaves no room for an image"):
        tiles(max_length=16)


def test_samples_are_not_cut_shorter_than_an_image(tmp_path):
    folder = write_model(tmp_path / "model", vision=VISION, text=TEXT)
    config = json.loads((folder / "config.json").read_text())
    config["image_seq_length"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    shaped = emloc.plan(model_name_or_path=str(folder), memory="1MiB")
    assert not shaped["fits"]
    assert shaped["options"]["max_length"] == 512
    assert shaped["given_up"][-1] == "max_length 512"


def test_towers_are_cut_apart(described):
    checkpoint, family = described["layer"]
    assert list(family.stacks(checkpoint)) == [3, 3]
    shallow = family.skeleton(family.shallow(checkpoint, [1, 2]), torch.float32)
    assert len(family.blocks(shallow)) == 3


def test_the_original_layout_by_its_config_alone():
    from emloc_vlm.internvl_chat_config import is_internvl_chat

    config = {
        "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "ps_version": "v2",
        "downsample_ratio": 0.5, "force_image_size": 56, "max_dynamic_patch": 4,
        "dynamic_image_size": True, "use_thumbnail": True,
        "llm_config": {
            "model_type": "internlm2", "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 100, "bias": False, "torch_dtype": "bfloat16",
        },
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 56, "norm_type": "layer_norm",
            "qk_normalization": False, "qkv_bias": True,
        },
    }  # fmt: skip
    assert is_internvl_chat(config)
    from emloc_vlm.family import VLMFamily

    family = VLMFamily()
    native = family.native(Described("x", Path("x"), config, {}))
    model = family.skeleton(native, torch.float32)
    assert len(family.blocks(model)) == 4
    batch = family.planned_batch(native, options(max_length=64), 1)
    assert batch["pixel_values"].shape == (5, 3, 56, 56)  # four tokens each: all of them fit
