"""A tiny random model of any causal LM type that the installed transformers knows."""

import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from emloc.integrations.transformers.byte_tokenizer import byte_tokenizer

MODEL_TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# What a field is called in the one or other architecture, and what makes it tiny. Sizes differ, so
# that a transposed product cannot go unnoticed.
SMALL = {
    32: ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "word_embed_proj_dim",
         "n_positions_embd", "lru_width", "model_dim"),
    48: ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim",
         "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size", "dff",
         "dim_ff", "intermediate_size_mlp", "d_inner", "expert_ffn_hidden_size", "moe_d_ff",
         "shared_intermediate_size", "moe_shared_expert_intermediate_size", "block_ff_dim"),
    2: ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
        "num_decoder_layers", "num_encoder_layers", "num_key_value_heads", "num_experts_per_tok",
        "num_experts_per_token", "moe_topk", "top_k_experts", "multi_query_group_num",
        "kv_n_heads", "num_selected_experts", "moe_top_k"),
    4: ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
        "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
        "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts",
        "linear_num_key_heads", "linear_num_value_heads"),
    8: ("head_dim", "kv_channels", "attention_head_dim", "rotary_dim", "qk_rope_head_dim",
        "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim",
        "dim_head", "attention_hidden_size_per_head", "index_head_dim"),
    16: ("q_lora_rank", "kv_lora_rank", "state_size", "mamba_d_state"),
    1: ("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts",
        "num_mtp_modules", "num_nextn_predict_layers"),
    256: ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
          "max_sequence_length"),
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1}
ALL_KEYS = {"num_key_value_heads": 4}  # multi-head latent attention has no shared keys

# What a type's own rules ask for beyond the names above.
OVERRIDES = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
         "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "dots3_note_text"), ALL_KEYS,
    ),
    "bamba": MAMBA,
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "ernie4_5_moe": {"moe_k": 2, "moe_layer_start_index": 0},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16], "num_buckets": 4},
    "roc_bert": {"shape_vocab_size": 16, "pronunciation_vocab_size": 16, "shape_embed_dim": 8,
                 "pronunciation_embed_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 259,
                    "num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8,
                     "vocab_size_per_layer_input": 259, "laurel_rank": 8,
                     "layer_types": ["sliding_attention", "full_attention"]},
    "kimi_linear": {"linear_head_dim": 8},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
              "attention_head_dim": 16, "mamba_dt_rank": 4, "n_mamba_heads": 2, "num_key_value_heads": 4,
              "attention_hidden_size": 64},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"],
               "num_mem_blocks": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip
SIZES = {name: value for value, names in SMALL.items() for name in names}


def tiny_config(model_type):
    """The type's default config, shrunk field by field."""
    tokenizer = byte_tokenizer()
    wanted = {
        **SIZES, "vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "is_decoder": True, "use_cache": False, "tie_word_embeddings": None,
    }  # fmt: skip
    cls = CONFIG_MAPPING[model_type]
    accepted = set(inspect.signature(cls.__init__).parameters) | set(vars(cls()))
    chosen = {k: v for k, v in wanted.items() if k in accepted and v is not None}
    return cls(**{**chosen, **OVERRIDES.get(model_type, {})})


def write_tiny(folder, model_type, dtype=torch.float32, seed=0, **saving):
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
        named = dict(model.named_parameters(remove_duplicate=False))
        for name, stored in model.state_dict().items():
            if name not in named and stored.is_floating_point():
                stored.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder, **saving)
    byte_tokenizer().save_pretrained(folder)
    return model
