"""Sizes for tiny language models of mlx-vlm, where `tests.zoo_configs` does not have them."""

from __future__ import annotations

from typing import Any

from tests import zoo_configs
from tests.zoo_configs import INDEXED, LAYERS, LINEAR, LLAMA4_ROPE, MIXED, WINDOW

EVEN_IF_NONE = zoo_configs.EVEN_IF_NONE | {
    "sliding_window", "n_group", "topk_group", "query_pre_attn_scalar", "rope_theta",
}  # fmt: skip
"""Fields that are filled in although the type's default is None."""

TEXT_TYPES = {
    "d1": "lfm2", "lfm2_vl": "lfm2", "llava": "llama", "llava_next": "llama", "llmjpvl": "qwen3",
    "minimax_m3_vl": "minimax_m3", "mistral3": "ministral3", "multi_modality": "llama",
    "paligemma": "gemma", "plamo2vl": "plamo2",
}  # fmt: skip
"""Model types in text settings, where they are not the name of the type."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass": dict(layer_types=MIXED),
    "deepseek_v4": dict(
        o_groups=2, o_lora_rank=16, index_n_heads=4, index_head_dim=16, index_topk=8,
        scoring_func="sqrtsoftplus", num_key_value_heads=1, num_hash_layers=1,
    ),
    "deepseek_v41": dict(
        o_groups=2, o_lora_rank=16, index_n_heads=4, index_head_dim=16, head_dim=64,
        qk_rope_head_dim=32, scoring_func="sqrtsoftplus", num_key_value_heads=1,
        compress_ratios=[0, 0, 2, 1], moe_intermediate_size=64, engram_layer_ids=[],
    ),
    "diffusion_gemma": dict(layer_types=MIXED, top_k_experts=2),
    "ernie4_5_moe_vl": dict(
        moe_num_experts=[2, 2], moe_intermediate_size=[48, 48], mrope_section=[3, 3, 2],
    ),
    "flint": dict(layer_types=MIXED),
    "florence2": dict(
        encoder_ffn_dim=96, decoder_ffn_dim=96, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4,
    ),
    "gemma3n": dict(intermediate_size=[96] * LAYERS),
    "gemma4": dict(layer_types=MIXED, num_kv_shared_layers=2, hidden_size_per_layer_input=16),
    "glm5_next": dict(
        layer_types=LINEAR, num_key_value_heads=4, head_dim=0, qk_head_dim=16, qk_rope_head_dim=0,
        linear_head_dim=16, linear_num_heads=4, index_head_dim=16, index_n_heads=4, index_topk=64,
        index_kpool=4,
    ),
    "hrm_text": dict(num_hidden_layers=8, num_layers_per_stack=1),
    "hunyuan_vl": dict(
        rope_scaling=dict(
            alpha=1000.0, factor=1.0, type="xdrope", xdrope_section=[2, 2, 2, 2],
        ),
    ),
    "hy_v4": dict(
        index_head_dim=16, index_n_heads=4, index_topk=INDEXED,
        indexer_types=["full", "shared"] * 2,
    ),
    "inkling": dict(
        layer_types=["hybrid_sliding", "hybrid_full"] * 2, swa_num_attention_heads=4,
        swa_num_key_value_heads=2, swa_head_dim=16, d_rel=8, rel_extent=64,
    ),
    "kolibri1": dict(layer_types=MIXED),
    "lfm2_vl": dict(layer_types=["conv", "full_attention"] * 2),
    "limite": dict(
        ve_dim=16, ve_gate_channels=8, attn_gate_channels=16, rope_n_pairs=4,
        global_layers=[1, 3], xsa_layers=[0, 1], ve_layers=[2, 3], mudd=False,
        softcap_logits=dict(kind="sigmoid", a=30.0, b=0.0, c=5.0),
    ),
    "longcat_flash_sparse": dict(
        index_n_heads=4, index_head_dim=16, index_topk=INDEXED, num_layers=2,
        expert_ffn_hidden_size=48,
    ),
    "mimo_v2": zoo_configs.OVERRIDES["mimo_v2_flash"],
    "minimax_m3_vl": dict(
        moe_layer_freq=[0, 1, 1, 1], layer_types=["minimax_m3_sparse", "full_attention"] * 2,
    ),
    "mistral3": dict(layer_types=MIXED, rope_parameters=LLAMA4_ROPE),
    "moondream3": dict(num_key_value_heads=4, rope_dim=8, moe_start_layer=2, prefix_attn=WINDOW),
    "nemotron_h_nano_omni": zoo_configs.OVERRIDES["nemotron_h"],
    "nemotron_nas": zoo_configs.OVERRIDES["nemotron-nas"],
    "nemotron_parse": dict(decoder_ffn_dim=96, decoder_layers=2, decoder_attention_heads=4),
    "qwen4_exp": dict(
        indexer_head_dim=16, indexer_budget=64, ple_layer_ids=[], hc_lowrank=16,
        full_attention_interval=2,
    ),
    "spark2_5": dict(layer_types=MIXED),
}  # fmt: skip
"""By model type, beside those of mlx-lm's type of the same name."""
