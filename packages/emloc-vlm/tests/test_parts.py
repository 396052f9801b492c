"""The parts of architectures by the names of their modules, and what the LoRA leaves alone by default."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from emloc.integrations.peft.targets import linear_targets
from emloc_vlm.parts import frozen_modules, part_of
from emloc_vlm_options import FreezeOptions

OTHERS = {
    "paddleocr_vl": "model.projector.",
    "lighton_ocr": "model.vision_projection.",
    "video_llama_3": "model.projector.",
    "kosmos-2": "image_to_text_projection.",
    "blip-2": ("qformer.", "language_projection"),
    "qwen2_5_omni_thinker": "model.audio_tower.",
}
"""Modules that are neither of the language model nor called as in most architectures."""


def shallow(kind):
    """The architecture on the meta device, with two blocks in each stack that can be cut."""
    config = AutoConfig.for_model(kind)
    for part in ("text_config", "vision_config", "audio_config", "qformer_config"):
        for depth in ("num_hidden_layers", "depth"):
            if hasattr(getattr(config, part, None), depth):
                setattr(getattr(config, part), depth, 2)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("kind", OTHERS)
def test_by_default_a_lora_is_on_the_language_model_alone(kind):
    model = shallow(kind)
    language = [
        name
        for name in linear_targets(model, frozen_modules(model, FreezeOptions()))
        if not name.startswith(OTHERS[kind])
    ]
    assert language
    everything = linear_targets(
        model,
        frozen_modules(
            model,
            FreezeOptions(freeze_vision_tower=False, freeze_multi_modal_projector=False),
        ),
    )
    assert any(name.startswith(OTHERS[kind]) for name in everything)
    assert list(linear_targets(model, frozen_modules(model, FreezeOptions()))) == language


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.language_model.layers.0.self_attn.q_proj", "language"),
        ("language_model.model.decoder.project_in", "language"),
        ("model.layers.0.mlp.down_proj", "language"),
        ("lm_head", "language"),
        ("model.vision_tower.embeddings.patch_embeddings.projection", "vision"),
        ("model.audio_tower.layers.0.fc1", "vision"),
        ("model.visual.merger.mlp.0", "projector"),
        ("model.mm_projector.in_proj", "projector"),
        ("model.resampler_model.spatial_linear.fc1", "projector"),
        ("model.vision_adapter.fc1", "projector"),
    ],
)
def test_names_tell_the_part(name, part):
    assert part_of(name) == part
