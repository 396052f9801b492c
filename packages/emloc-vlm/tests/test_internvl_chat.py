"""Original InternVL checkpoints: read without their code, they are transformers' model bit for bit.

The tests write the original layout themselves, from a random native model.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from emloc.artefacts.checkpoint import Checkpoint
from emloc.errors import CheckpointError
from emloc_vlm.internvl_chat import is_internvl_chat, native_config, native_view

HEADS, GROUPS, VISION_HEADS = 6, 2, 3
IMAGE_TOKEN_ID = 45

LANGUAGE = {
    "hidden_size": 24, "intermediate_size": 28, "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS, "num_hidden_layers": 2, "vocab_size": 50, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "auto_map": {"AutoConfig": "configuration.Unknown"},
}  # fmt: skip
LANGUAGES = {
    "internlm2": {"bias": False},
    "internlm2 with biases": {"bias": True, "model_type": "internlm2"},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {"head_dim": 10},
}
VISION = {
    "model_type": "intern_vit_6b", "hidden_size": 12, "intermediate_size": 20,
    "num_attention_heads": VISION_HEADS, "num_hidden_layers": 3, "image_size": 12, "patch_size": 3,
    "hidden_act": "gelu", "layer_norm_eps": 1e-6, "initializer_factor": 0.1, "dropout": 0.0,
}  # fmt: skip
VISIONS = {
    "300M": {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True},
    "6B": {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False},
}


def chat_config(language="internlm2", vision="300M", **more):
    llm = {"model_type": language, **LANGUAGE, **LANGUAGES[language]}
    return {
        "model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "ps_version": "v2",
        "downsample_ratio": 0.5, "select_layer": -1, "force_image_size": 12, "torch_dtype": "bfloat16",
        "dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 12,
        "llm_config": llm, "vision_config": {**VISION, **VISIONS[vision]}, **more,
    }  # fmt: skip


def original_tensors(state, internlm2):
    """A native state dict as OpenGVLab's code stores it."""
    stored = {}
    for name, tensor in state.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue  # goes with the queries, where it is fused
        if name.startswith("model.vision_tower."):
            name = name.replace("model.vision_tower.encoder.layer", "vision_model.encoder.layers")
            name = name.replace("model.vision_tower", "vision_model")
            for new, old in {
                "cls_token": "class_embedding", "position_embeddings": "position_embedding",
                "patch_embeddings.projection": "patch_embedding", "lambda_": "ls",
                "attention.projection_layer": "attn.proj", "layernorm_before": "norm1",
                "layernorm_after": "norm2", "attention.": "attn.",
            }.items():  # fmt: skip
                name = name.replace(new, old)
            stored[name] = tensor
        elif name.startswith("model.multi_modal_projector."):
            layer, leaf = name.split(".")[2:]
            stored[f"mlp1.{['layer_norm', 'linear_1', '', 'linear_2'].index(layer)}.{leaf}"] = (
                tensor
            )
        else:
            name = "language_model." + name.replace("model.language_model.", "model.")
            stored[name] = tensor
    for name in [name for name in state if ".q_proj." in name]:
        q, k, v = (state[name.replace("q_proj", f"{part}_proj")] for part in "qkv")
        if "vision_tower" in name:
            index, leaf = name.split(".")[4], name.split(".")[-1]
            del stored[f"vision_model.encoder.layers.{index}.attn.q_proj.{leaf}"]
            stored[f"vision_model.encoder.layers.{index}.attn.qkv.{leaf}"] = torch.cat([q, k, v])
            continue
        key = "language_model." + name.replace("model.language_model.", "model.")
        if internlm2:
            rows = [part for n in range(GROUPS) for part in (t.chunk(GROUPS)[n] for t in (q, k, v))]
            stored[key.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
            del stored[key]
        else:
            stored[key.replace("q_proj", "k_proj")] = k
            stored[key.replace("q_proj", "v_proj")] = v
    if internlm2:
        new_names = {
            "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
            "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
            "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
            "model.embed_tokens": "model.tok_embeddings", "language_model.lm_head": "language_model.output",
        }  # fmt: skip
        for name in [name for name in stored if name.startswith("language_model.")]:
            renamed = name
            for new, old in new_names.items():
                renamed = renamed.replace(new, old)
            stored[renamed] = stored.pop(name)
    return stored


def native_model(config, dtype=torch.float32, seed=0):
    """A random model whose norms, biases and scales are random too."""
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(InternVLConfig.from_dict(config)).eval()
    for parameter in model.parameters():  # buffers stay as from_pretrained leaves them, in float32
        parameter.data = torch.nn.init.normal_(parameter, std=0.3).data.to(dtype)
    return model


def write(folder, config, tensors):
    """Save in two shards, as OpenGVLab's checkpoints are."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, held in shards.items():
        save_file({name: tensors[name].contiguous() for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint.open(folder)


def original(folder, config, dtype=torch.float32):
    """A random native model, and the original checkpoint that it is."""
    model = native_model(native_config(config, IMAGE_TOKEN_ID), dtype)
    internlm2 = config["llm_config"]["model_type"] == "internlm2"
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    tensors = original_tensors(state, internlm2)
    checkpoint = write(folder, config, tensors)
    (folder / "added_tokens.json").write_text(json.dumps({"<IMG_CONTEXT>": IMAGE_TOKEN_ID}))
    return model, checkpoint


def logits(model):
    torch.manual_seed(1)
    ids = torch.randint(0, IMAGE_TOKEN_ID, (2, 9))
    ids[:, 2:6] = IMAGE_TOKEN_ID
    pixels = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("language", LANGUAGES)
def test_the_view_is_the_same_model(tmp_path, language, vision, dtype):
    model, checkpoint = original(tmp_path / "original", chat_config(language, vision), dtype)
    view = native_view(checkpoint)
    assert view.config["image_token_id"] == IMAGE_TOKEN_ID
    again = native_model(view.config, dtype, seed=2)
    # Strict: every parameter is there, and nothing else.
    again.load_state_dict({name: view.read(name) for name in view.tensors}, strict=True)
    assert torch.equal(logits(again), logits(model))
    assert {info.file for info in view.tensors.values()} == {
        info.file for info in checkpoint.tensors.values()
    }


def test_transformers_loads_what_a_merge_writes(tmp_path):
    """Tensors of one shard go into one shard of the same name; config and index are the view's."""
    model, checkpoint = original(tmp_path / "original", chat_config("qwen2"), torch.bfloat16)
    view = native_view(checkpoint)
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in {info.file for info in view.tensors.values()}:
        held = {name: view.read(name).clone() for name, _ in view.headers(file)}
        save_file(held, merged / file, metadata={"format": "pt"})
    weight_map = {name: info.file for name, info in view.tensors.items()}
    index = {"metadata": {}, "weight_map": weight_map}
    (merged / "model.safetensors.index.json").write_text(json.dumps(index))
    (merged / "config.json").write_text(json.dumps(view.config))
    again, loading = InternVLForConditionalGeneration.from_pretrained(
        merged, output_loading_info=True
    )
    assert again.dtype == torch.bfloat16
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(again), logits(model))


def test_fused_projections_mean_what_the_original_code_computes(tmp_path):
    """On activations: its forward splits heads after the product, the view splits rows before it."""
    _, checkpoint = original(tmp_path / "original", chat_config())
    view = native_view(checkpoint)
    x = torch.randn(5, 24)
    fused = x @ checkpoint.read("language_model.model.layers.1.attention.wqkv.weight").T
    heads = fused.view(5, GROUPS, HEADS // GROUPS + 2, 4)
    expected = {"q": heads[:, :, :-2].reshape(5, -1), "k": heads[:, :, -2], "v": heads[:, :, -1]}
    for part, value in expected.items():
        weight = view.read(f"model.language_model.layers.1.self_attn.{part}_proj.weight")
        torch.testing.assert_close(x @ weight.T, value.reshape(5, -1))
    x = torch.randn(5, 12)
    fused = x @ checkpoint.read("vision_model.encoder.layers.1.attn.qkv.weight").T
    split = fused.view(5, 3, VISION_HEADS, 4)
    for index, part in enumerate("qkv"):
        weight = view.read(f"model.vision_tower.encoder.layer.1.attention.{part}_proj.weight")
        torch.testing.assert_close(x @ weight.T, split[:, index].reshape(5, -1))


def test_tied_embeddings_are_stored_once(tmp_path):
    config = chat_config("qwen2")
    config["llm_config"]["tie_word_embeddings"] = True
    model, checkpoint = original(tmp_path / "original", config)
    view = native_view(checkpoint)
    assert "lm_head.weight" not in view.tensors
    again = native_model(view.config, seed=2)
    again.load_state_dict({name: view.read(name) for name in view.tensors}, strict=False)
    assert torch.equal(logits(again), logits(model))


def test_reading_one_tensor_reads_no_other(tmp_path, monkeypatch):
    _, checkpoint = original(tmp_path / "original", chat_config())
    read = []
    stored_read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", lambda name: read.append(name) or stored_read(name))
    view = native_view(checkpoint)
    assert read == []
    view.read("model.language_model.layers.0.self_attn.q_proj.weight")
    part = view.read("model.vision_tower.encoder.layer.2.attention.k_proj.weight")
    assert read == [
        "language_model.model.layers.0.attention.wqkv.weight",
        "vision_model.encoder.layers.2.attn.qkv.weight",
    ]
    assert part.untyped_storage().nbytes() > part.nbytes  # a view of the file


def test_select_layer_counts_as_in_the_original():
    """-2 is what the last but one block gives: the same as a model without the last block."""
    config = native_config(chat_config(select_layer=-2), IMAGE_TOKEN_ID)
    model = native_model(config)
    shorter = {**config, "vision_feature_layer": -1}
    shorter["vision_config"] = {**config["vision_config"], "num_hidden_layers": 2}
    short = native_model(shorter)
    short.load_state_dict(
        {name: value for name, value in model.state_dict().items() if ".layer.2." not in name}
    )
    assert torch.equal(logits(model), logits(short))


def test_config():
    config = native_config(chat_config("internlm2 with biases", "6B", force_image_size=18))
    assert is_internvl_chat(chat_config())
    assert not is_internvl_chat(config)
    native = InternVLConfig.from_dict(config)
    vision, text = native.vision_config, native.text_config
    assert native.architectures == ["InternVLForConditionalGeneration"]
    assert (native.image_token_id, native.image_seq_length) == (92546, 9)
    assert native.dtype == torch.bfloat16
    assert not native.tie_word_embeddings
    assert list(vision.image_size) == [12, 12]
    assert (vision.use_qk_norm, vision.attention_bias, vision.norm_type) == (
        True,
        False,
        "rms_norm",
    )
    assert text.model_type == "llama"
    assert (text.attention_bias, text.mlp_bias, text.head_dim) == (True, False, 4)
    assert text.num_key_value_heads == GROUPS
    assert text.rope_parameters["rope_theta"] == 5000.0
    assert text.rope_parameters["rope_type"] == "dynamic"
    assert text.rope_parameters["factor"] == 2.0
    assert not hasattr(text, "auto_map")
    assert native_config(chat_config("qwen2"))["image_token_id"] == 151667


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ps_version": "v1"}, "ps_version v1"),
        ({"llm_config": {**LANGUAGE, "model_type": "phi3"}}, "language model of type phi3"),
        ({"llm_config": {**LANGUAGE, "model_type": "llama"}}, "which id <IMG_CONTEXT> has"),
        (
            {"llm_config": {**LANGUAGE, "model_type": "internlm2", "rope_pos_id_version": "v2pe"}},
            "positions of version v2pe",
        ),
        ({"vision_config": {**VISION, "norm_type": "batch_norm"}}, "norms of type batch_norm"),
        ({"vision_config": {**VISION, "layer_norm_eps": 1e-5}}, "normalised queries"),
        ({"use_llm_lora": 16}, "use_llm_lora"),
    ],
)
def test_what_transformers_cannot_be_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        native_config({**chat_config(), **change})


def test_unknown_missing_and_misfitting_tensors_are_named(tmp_path):
    config = chat_config()
    model = native_model(native_config(config, IMAGE_TOKEN_ID))
    tensors = original_tensors(model.state_dict(), internlm2=True)
    wqkv = "language_model.model.layers.0.attention.wqkv.weight"
    more = {**tensors, "vision_model.head.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match=r"Tensor vision_model\.head\.weight of"):
        native_view(write(tmp_path / "more", config, more))
    fewer = {name: tensor for name, tensor in tensors.items() if name != "mlp1.3.bias"}
    with pytest.raises(CheckpointError, match=r"holds no tensor mlp1\.3\.bias"):
        native_view(write(tmp_path / "fewer", config, fewer))
    cut = {**tensors, wqkv: tensors[wqkv][:-4]}
    with pytest.raises(CheckpointError, match="wqkv.weight of .* does not fit its config.json"):
        native_view(write(tmp_path / "cut", config, cut))
