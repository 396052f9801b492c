"""Adapters of models of two towers: older names, tied heads, blocks of a stack."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_vlm_architectures import idefics, llava, qwen
from transformers import AutoModelForImageTextToText, Florence2Config, Gemma3Config
from vlm_reference import load

import emloc
from emloc.artefacts.adapter import Adapter
from emloc.artefacts.checkpoint import Checkpoint
from emloc.config import PlanConfig, build
from emloc.errors import ConfigError, MismatchError
from emloc.extend.plugin_options import with_plugin_options
from emloc.integrations.peft.attach import attach
from emloc.integrations.transformers.lively_model import lively_model
from emloc.planning.subject import Subject
from emloc_vlm.family import VLMFamily

OLDER = {
    llava: {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head": "language_model.lm_head",
    },
    qwen: {"model.language_model.": "model.", "model.visual.": "visual."},
}
"""What modules were called in transformers 4."""

TEXT = {"vocab_size": 300, "pad_token_id": 0}
SMALL = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2,
         "num_attention_heads": 5, "image_size": 16, "patch_size": 4}  # fmt: skip


def gemma():
    text = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, **TEXT}  # fmt: skip
    return Gemma3Config(
        text_config=text, vision_config=SMALL, mm_tokens_per_image=4, image_token_index=299,
        architectures=["Gemma3ForConditionalGeneration"],
    )  # fmt: skip


def florence():
    text = {"model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
            "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48, "max_position_embeddings": 128, **TEXT}  # fmt: skip
    vision = {"embed_dim": [8, 16], "num_heads": [2, 2], "num_groups": [2, 2], "depths": [1, 1],
              "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
              "patch_prenorm": [False, True], "projection_dim": 32}  # fmt: skip
    return Florence2Config(
        text_config=text, vision_config=vision, image_token_id=299,
        architectures=["Florence2ForConditionalGeneration"],
    )  # fmt: skip


def written(folder, config):
    lively_model(AutoModelForImageTextToText, config, 0).save_pretrained(folder)
    return folder


def read(model):
    ids = torch.arange(3, 21).view(2, 9)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def trained(base, folder, **options):
    config = LoraConfig(**{"r": 2, "init_lora_weights": False, **options})
    model = get_peft_model(load(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return read(model)


@pytest.mark.parametrize("head", [[], ["lm_head"]])
@pytest.mark.parametrize("build_config", [llava, qwen])
def test_older_names_are_those_of_the_modules_now(tmp_path, build_config, head):
    base = written(tmp_path / "base", build_config()[0])
    adapter = tmp_path / "a"
    expected = trained(
        base, adapter, target_modules=["q_proj", "fc1", "up_proj", "linear_1"],
        modules_to_save=head or None,
    )  # fmt: skip
    tensors = load_file(adapter / "adapter_model.safetensors")
    prefix = "base_model.model."

    def older(key):
        for new, old in OLDER[build_config].items():
            if key.startswith(prefix + new):
                return prefix + old + key.removeprefix(prefix + new)
        return key

    renamed = {older(key): value for key, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, adapter / "adapter_model.safetensors")
    folder = emloc.merge(
        adapter=str(adapter), model_name_or_path=str(base), output_dir=tmp_path / "m"
    )
    torch.testing.assert_close(read(load(folder)), expected, rtol=1e-4, atol=1e-4)
    adapted = attach(load(base), str(adapter), Checkpoint.open(base), VLMFamily())
    assert torch.equal(read(adapted), expected)
    verified = emloc.verify(path=adapter, model_name_or_path=str(base))
    assert verified["base_model"] == str(base)
    both = {**renamed, **{key: value.clone() for key, value in tensors.items()}}
    save_file(both, adapter / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match="mixes names of two versions"):
        emloc.verify(path=adapter, model_name_or_path=str(base))


def tied(build_config):
    made = build_config()
    config = made[0] if isinstance(made, tuple) else made
    config.tie_word_embeddings = True
    return config


@pytest.mark.parametrize("build_config", [llava, idefics, gemma, florence])
def test_tied_heads_come_apart(tmp_path, build_config):
    """Wherever the config says that they are tied, and however many parameters are."""
    base = written(tmp_path / "base", tied(build_config))
    model = load(base)
    names = {id(module): name for name, module in model.named_modules()}
    head = names[id(model.get_output_embeddings())]
    embeddings = names[id(model.get_input_embeddings())]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    linear = next(name for name in names.values() if name.endswith("q_proj"))
    kinds = [
        {"target_modules": [linear], "modules_to_save": [head]},
        {"target_modules": [linear], "modules_to_save": [embeddings]},
        {"target_modules": [linear, head]},
    ]
    for index, options in enumerate(kinds):
        expected = trained(base, tmp_path / f"a{index}", **options)
        folder = emloc.merge(
            adapter=str(tmp_path / f"a{index}"), model_name_or_path=str(base),
            output_dir=tmp_path / f"m{index}",
        )  # fmt: skip
        torch.testing.assert_close(read(load(folder)), expected, rtol=1e-5, atol=1e-5)
        assert not json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
        assert emloc.verify(path=folder)["kind"] == "merged_model"


def test_blocks_are_numbered_within_a_tower(tiny, tmp_path):
    options = {
        "model_name_or_path": str(tiny.base), "max_steps": 1, "lora_r": 2,
        "lora_layers_to_transform": "1", **tiny.common,
    }  # fmt: skip
    several = {"freeze_vision_tower": False, **options}
    listed = (
        r"model\.vision_tower\.encoder\.layer \(0 to .\), model\.language_model\.layers \(0 to .\)"
    )
    with pytest.raises(ConfigError, match=f"several stacks .* lora_layers_pattern: {listed}"):
        emloc.train(output_dir=tmp_path / "x", **several)
    towers = {
        "layers": "model.language_model.layers.1.",
        "vision_tower.encoder.layer": "model.vision_tower.encoder.layer.1.",
    }
    for pattern, inside in towers.items():
        chosen = {**several, "lora_layers_pattern": pattern}
        folder = emloc.train(output_dir=tmp_path / pattern, **chosen)
        names = {layer.name for layer in Adapter.open(str(folder)).layers}
        assert names
        assert all(name.startswith(inside) for name in names)
        kept = {k: v for k, v in chosen.items() if k not in ("dataset", "max_steps")}
        plan = build(with_plugin_options(PlanConfig), kept, "plan")
        assert Subject.of(str(tiny.base), "auto").adapted(plan) == names
    # What is frozen makes nothing ambiguous.
    folder = emloc.train(output_dir=tmp_path / "one", **options)
    names = {layer.name for layer in Adapter.open(str(folder)).layers}
    assert all(name.startswith("model.language_model.layers.1.") for name in names)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    PeftModel.from_pretrained(load(tiny.base), folder)
