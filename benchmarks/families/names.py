"""The families that are tried, with what the configuration of a tiny model of each needs beyond the common sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.families.tiny import SIZES

PLAIN = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "beam",
    "biogpt",
    "bloom",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "ctrl",
    "cwm",
    "deepseek_v4",
    "diffllama",
    "doge",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon_mamba",
    "flex_olmo",
    "flint",
    "fuyu",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_oss",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoeshared",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jetmoe",
    "lfm2",
    "lfm3",
    "llama",
    "llama4_text",
    "mamba",
    "mellum",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "moshi",
    "mpt",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo_hybrid",
    "openai-gpt",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen3",
    "recurrent_gemma",
    "rwkv",
    "seed_oss",
    "smollm3",
    "solar_open",
    "starcoder2",
    "vaultgemma",
    "xglm",
    "zaya",
]

LATENT: dict[str, Any] = {
    "head_dim": None, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
"""Attention by latent vectors."""

EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}

LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

MORE: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 16, "attn_layer_indices": [1]},
    "bitnet": {"hidden_size": 64, "head_dim": None},
    "codegen": {"n_head": 4, "n_embd": 64, "rotary_dim": 8},
    "deepseek_v2": {**LATENT, **EXPERTS, "first_k_dense_replace": 1},
    "deepseek_v3": {**LATENT, **EXPERTS, "first_k_dense_replace": 1},
    "deepseek_v32": {**LATENT, **EXPERTS, "first_k_dense_replace": 1, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4},
    "dots1": {**EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon": {"head_dim": None},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
        "mamba_chunk_size": 16,
    },
    "gemma3": {"text_config": SIZES, "vision_config": VISION, "image_token_index": 90, "mm_tokens_per_image": 4},
    "gemma4": {
        "text_config": {**SIZES, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 0, "global_head_dim": 16},
        "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 16}, "audio_config": None, "image_token_id": 90, "video_token_id": 91,
        "audio_token_id": 92,
    },
    "glm4_moe_lite": {**LATENT, **EXPERTS},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gpt_neox": {"head_dim": None},
    "gpt_neox_japanese": {"head_dim": None},
    "gptj": {"n_head": 4, "n_embd": 64, "rotary_dim": 8},
    "granitemoehybrid": {
        "mamba_n_heads": 6, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 16,
        "layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 2, "num_experts_per_tok": 1,
    },
    "helium": {"hidden_size": 64, "num_attention_heads": 4},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "llama4": {
        "text_config": {**SIZES, "intermediate_size_mlp": 80, "num_local_experts": 2},
        "vision_config": {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
    "mamba2": {"num_heads": 6, "head_dim": 16, "expand": 2, "n_groups": 1, "state_size": 16},
    "minicpm3": LATENT,
    "mistral3": {
        "text_config": {**SIZES, "model_type": "mistral"}, "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": 90,
    },
    "modernbert-decoder": {"head_dim": None, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "olmo3": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "olmoe": {"num_key_value_heads": 4, "head_dim": None},
    "persimmon": {"hidden_size": 64, "head_dim": None},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_vl": {
        "text_config": {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 32, "depth": 2, "num_heads": 2, "out_hidden_size": 48, "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
        "image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93,
    },
    "qwen3_next": {
        **LINEAR_ATTENTION, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "stablelm": {"hidden_size": 64, "head_dim": None},
    "youtu": LATENT,
}  # fmt: skip

FAMILIES: dict[str, dict[str, Any]] = {name: MORE.get(name, {}) for name in sorted({*PLAIN, *MORE})}
"""By ``model_type``. A value None leaves the common size out."""
