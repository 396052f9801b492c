"""The `config.json` of an original InternVL checkpoint, in the words of transformers' InternVL.

Facts from OpenGVLab/InternVL `internvl_chat/internvl/model` (configuration and modelling files) and from
transformers' `models/internvl`.
"""

from collections.abc import Mapping
from typing import Any

from emloc.artefacts.schema import conforming
from emloc.errors import CheckpointError
from emloc_vlm.internvl_chat_schema import ChatConfig

IMAGE_TOKEN = "<IMG_CONTEXT>"

LANGUAGE_MODELS = {"internlm2": "llama", "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Types of language models, with the type that transformers knows the same computation by."""

IMAGE_TOKEN_IDS = {"internlm2": 92546, "qwen2": 151667, "qwen3": 151667}
"""Token ids of the published checkpoints, for a folder that has no tokenizer."""

TEXT_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
]
"""The fields of a language model's configuration; the rest is about code that is not run."""

TILING = {
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}
"""Options of cutting images into tiles, and InternVLChatConfig's defaults; kept for `native_processor`."""

TEMPLATE = "internvl2_5"
"""The chat template of InternVL 2.5 and 3, in OpenGVLab's `conversation.py`."""

SEPARATORS = {TEMPLATE: "<|im_end|>\n", "Hermes-2": "<|im_end|>", "internlm2-chat": "<|im_end|>"}
"""Ends of messages by the template that config.json names; those of InternVL 2 have no line break."""

VISION_DEFAULTS = {
    "hidden_size": 3200,
    "intermediate_size": 12800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "initializer_factor": 0.1,
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "qk_normalization": True,
    "qkv_bias": False,
}
"""InternVisionConfig's, which are others than those of transformers."""


def is_internvl_chat(config: Mapping[str, Any]) -> bool:
    """Return whether a parsed `config.json` is of an original InternVL checkpoint."""
    return config.get("model_type") == "internvl_chat"


def has_original_processor(config: Mapping[str, Any]) -> bool:
    """Return whether the files beside a `config.json` need `native_processor`.

    They do for original checkpoints and for what was made of one: emulators, merged models.
    """
    return is_internvl_chat(config) or TILING.keys() <= config.keys()


def native_config(config: Mapping[str, Any], image_token_id: int | None = None) -> dict[str, Any]:
    """The `config.json` of the same model in transformers.

    Args:
        config: of the original checkpoint.
        image_token_id: of `<IMG_CONTEXT>`; by default that of the published checkpoints.

    Raises:
        CheckpointError: transformers' model cannot be this one.
    """
    conforming(ChatConfig, config, "InternVL's config.json")
    vision: dict[str, Any] = {**VISION_DEFAULTS, **config.get("vision_config", {})}
    language: dict[str, Any] = dict(config.get("llm_config", {}))
    _refuse(config, vision, language)
    if image_token_id is None:
        image_token_id = IMAGE_TOKEN_IDS.get(language["model_type"])
    if image_token_id is None:
        raise CheckpointError(
            f"InternVL: the tokenizer's files do not say which id {IMAGE_TOKEN} has; copy "
            f"added_tokens.json or tokenizer_config.json into the model's folder."
        )
    dtype = config.get("torch_dtype") or config.get("dtype") or language.get("torch_dtype")
    typed = {"dtype": dtype} if dtype else {}
    ratio: float = config.get("downsample_ratio", 0.5)
    image_size = config.get("force_image_size") or vision["image_size"]
    if image_size < vision["patch_size"] / ratio:
        raise CheckpointError(
            f"InternVL: pictures of {image_size} pixels in patches of {vision['patch_size']} leave nothing "
            f"for the language model; correct force_image_size or patch_size in config.json."
        )
    text = _text_config(language)
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": {**_vision_config(vision), **typed},
        "text_config": {**text, **typed},
        "downsample_ratio": ratio,
        "image_token_id": image_token_id,
        "image_seq_length": int((image_size // vision["patch_size"]) ** 2 * ratio**2),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text["tie_word_embeddings"],
        **typed,
        "force_image_size": image_size,
        **{key: config.get(key, default) for key, default in TILING.items()},
        "template": config.get("template") or TEMPLATE,
    }


def _refuse(
    config: Mapping[str, Any], vision: Mapping[str, Any], language: Mapping[str, Any]
) -> None:
    kind = language.get("model_type")
    if kind not in LANGUAGE_MODELS:
        raise CheckpointError(
            f"InternVL with a language model of type {kind} cannot be read from its original checkpoint "
            f"(known: {', '.join(LANGUAGE_MODELS)}); take the model's -hf checkpoint."
        )
    for key in ("num_attention_heads", *(("hidden_size",) if kind == "internlm2" else ())):
        if key not in language:
            raise CheckpointError(
                f"InternVL's config.json has no llm_config.{key}; download it again."
            )
    if config.get("ps_version", "v1") != "v2":
        raise CheckpointError(
            "InternVL with ps_version v1 orders image tokens in a way that transformers does not have; "
            "take InternVL 2 or later."
        )
    if language.get("rope_pos_id_version", "default") != "default":
        raise CheckpointError(
            f"InternVL with positions of version {language['rope_pos_id_version']} cannot be run by "
            f"transformers; take a checkpoint with default positions."
        )
    if vision["norm_type"] not in ("layer_norm", "rms_norm"):
        raise CheckpointError(
            f"InternVL with vision norms of type {vision['norm_type']} cannot be run by transformers; "
            f"layer_norm and rms_norm can."
        )
    if vision["qk_normalization"] and vision["layer_norm_eps"] != 1e-6:
        raise CheckpointError(
            f"InternVL with normalised queries and layer_norm_eps {vision['layer_norm_eps']} cannot be "
            f"run by transformers, which has 1e-6 there; take the model's -hf checkpoint."
        )
    for key in ("use_backbone_lora", "use_llm_lora"):
        if config.get(key):
            raise CheckpointError(
                f"This InternVL checkpoint holds a LoRA of its own ({key}); merge it first with "
                f"OpenGVLab's tools/merge_lora.py."
            )


def _vision_config(vision: Mapping[str, Any]) -> dict[str, Any]:
    same = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_channels",
        "hidden_act",
        "norm_type",
        "layer_norm_eps",
        "initializer_range",
        "attention_dropout",
    ]
    return {
        "model_type": "internvl_vision",
        **{key: vision[key] for key in same},
        "image_size": [vision["image_size"]] * 2,
        "patch_size": [vision["patch_size"]] * 2,
        "attention_bias": vision["qkv_bias"],
        "use_qk_norm": vision["qk_normalization"],
        "projection_dropout": vision["dropout"],
        "hidden_dropout_prob": 0.0,
        "layer_scale_init_value": vision["initializer_factor"],
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
    }


def _text_config(language: Mapping[str, Any]) -> dict[str, Any]:
    kind = language["model_type"]
    text = {key: language[key] for key in TEXT_FIELDS if key in language}
    text["model_type"] = LANGUAGE_MODELS[kind]
    # The default of all four; transformers' default for InternVL as a whole is to tie.
    text["tie_word_embeddings"] = bool(language.get("tie_word_embeddings", False))
    text["num_key_value_heads"] = (
        language.get("num_key_value_heads") or language["num_attention_heads"]
    )
    if kind == "internlm2":
        text["attention_bias"] = language.get("bias", True)
        text["mlp_bias"] = False
        text["head_dim"] = language["hidden_size"] // language["num_attention_heads"]
    return text
