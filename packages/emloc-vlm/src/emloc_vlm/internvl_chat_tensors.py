"""The map from tensors of an original InternVL checkpoint to those of transformers' InternVL.

| stored | shape | becomes |
|---|---|---|
| `vision_model….attn.qkv` | 3 · d × d | q, k, v: a third of the rows each |
| `language_model….attention.wqkv` (InternLM2) | (h + 2 · h_kv) · d_head × d | see `_of_groups` |
| all others | | the same tensor under another name |

Facts from OpenGVLab/InternVL `internvl_chat/internvl/model` and from transformers'
`models/internvl/convert_internvl_weights_to_hf.py`.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from emloc.artefacts.tensor_info import TensorInfo
from emloc.artefacts.translated import Rule, Take, whole

VISION_LAYER = {
    "attn.proj": "attention.projection_layer",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}
PROJECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
INTERNLM2_LAYER = {
    "attention.wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.wo": ("self_attn.o_proj",),
    "feed_forward.w1": ("mlp.gate_proj",),
    "feed_forward.w2": ("mlp.down_proj",),
    "feed_forward.w3": ("mlp.up_proj",),
    "attention_norm": ("input_layernorm",),
    "ffn_norm": ("post_attention_layernorm",),
}
ENDS = {
    "model.embed_tokens": "model.language_model.embed_tokens",
    "model.norm": "model.language_model.norm",
    "lm_head": "lm_head",
}
INTERNLM2_ENDS = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output"}


Names = tuple[str, tuple[str, ...]]
"""A stored tensor and what it becomes."""


def tensor_names(config: Mapping[str, Any], internlm2: bool) -> dict[str, tuple[str, ...]]:
    """Every tensor that a checkpoint stores, with the names of what it becomes.

    Args:
        config: of transformers' InternVL.
        internlm2: whether the language model is stored as InternLM2.
    """
    projector = [
        entry
        for stored, new in PROJECTOR.items()
        for entry in _linear(f"mlp1.{stored}", f"model.multi_modal_projector.{new}")
    ]
    vision = _vision(config["vision_config"])
    return dict([*vision, *projector, *_language(config["text_config"], internlm2)])


def _linear(stored: str, *new: str, bias: bool = True) -> Iterator[Names]:
    for leaf in ("weight", "bias") if bias else ("weight",):
        yield f"{stored}.{leaf}", tuple(f"{name}.{leaf}" for name in new)


def _vision(config: Mapping[str, Any]) -> Iterator[Names]:
    old, new = "vision_model.embeddings", "model.vision_tower.embeddings"
    yield f"{old}.class_embedding", (f"{new}.cls_token",)
    yield f"{old}.position_embedding", (f"{new}.position_embeddings",)
    yield from _linear(f"{old}.patch_embedding", f"{new}.patch_embeddings.projection")
    for index in range(config["num_hidden_layers"]):
        old = f"vision_model.encoder.layers.{index}"
        new = f"model.vision_tower.encoder.layer.{index}"
        yield f"{old}.ls1", (f"{new}.lambda_1",)
        yield f"{old}.ls2", (f"{new}.lambda_2",)
        parts = [f"{new}.attention.{part}_proj" for part in "qkv"]
        yield from _linear(f"{old}.attn.qkv", *parts, bias=config["attention_bias"])
        for part in "qk" if config["use_qk_norm"] else "":
            yield from _linear(
                f"{old}.attn.{part}_norm", f"{new}.attention.{part}_norm", bias=False
            )
        for stored, name in VISION_LAYER.items():
            bias = not name.startswith("layernorm") or config["norm_type"] == "layer_norm"
            yield from _linear(f"{old}.{stored}", f"{new}.{name}", bias=bias)


def _language(config: Mapping[str, Any], internlm2: bool) -> Iterator[Names]:
    layer = INTERNLM2_LAYER
    if not internlm2:  # named as in transformers
        layer = {name: (name,) for names in layer.values() for name in names}
    if config["model_type"] == "qwen3":
        layer = layer | {f"self_attn.{part}_norm": (f"self_attn.{part}_norm",) for part in "qk"}
    for index in range(config["num_hidden_layers"]):
        old = f"language_model.model.layers.{index}"
        new = f"model.language_model.layers.{index}"
        for stored, names in layer.items():
            bias = _has_bias(config, names[0])
            yield from _linear(f"{old}.{stored}", *(f"{new}.{name}" for name in names), bias=bias)
    for stored, new in ENDS.items():
        name = INTERNLM2_ENDS.get(stored, stored) if internlm2 else stored
        yield from _linear(f"language_model.{name}", new, bias=False)


def _has_bias(config: Mapping[str, Any], name: str) -> bool:
    """Return whether a linear layer or norm of a language model's block has one."""
    if name.endswith("norm"):
        return False
    if name.startswith("mlp."):
        return bool(config.get("mlp_bias", False))
    if config["model_type"] == "qwen2":  # not configurable there
        return name != "self_attn.o_proj"
    return bool(config.get("attention_bias", False))


def layout_rule(names: Mapping[str, tuple[str, ...]], text_config: Mapping[str, Any]) -> Rule:
    """The rule for `TranslatedCheckpoint`.

    Args:
        names: see `tensor_names`.
        text_config: of transformers' language model, for the heads that InternLM2 fuses.
    """
    heads, groups = text_config["num_attention_heads"], text_config["num_key_value_heads"]
    head = text_config["hidden_size"] // heads

    def rule(stored: str, _: TensorInfo) -> Mapping[str, Take]:
        new = names.get(stored, ())
        if len(new) == 1:
            return {new[0]: whole}
        split = partial(_of_groups, groups, heads // groups, head) if ".wqkv." in stored else _third
        return {name: partial(split, index) for index, name in enumerate(new)}

    return rule


def _third(index: int, tensor: Tensor) -> Tensor:
    """One of three blocks of rows; a view."""
    return tensor.unflatten(0, (3, -1))[index]


def _of_groups(groups: int, queries: int, head: int, index: int, tensor: Tensor) -> Tensor:
    """Queries (index 0), keys (1) or values (2) out of InternLM2's `wqkv`.

    Its rows are `groups` times the same: `queries` heads of queries, one of keys, one of values.
    """
    heads = tensor.unflatten(0, (groups, queries + 2, head))
    part = heads[:, :queries] if index == 0 else heads[:, queries + index - 1 : queries + index]
    return part.flatten(0, 2)
