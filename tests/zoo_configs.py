"""Sizes for tiny models of every mlx-lm model type; `tests.model_zoo` builds them.

`COMMON` is filled in by the name of the field, whatever the type. `OVERRIDES` are for the types
whose fields mean something else, and for layers of several kinds: four layers are enough to
have one of each. Windows are small, so that they wrap within a test.
"""

from __future__ import annotations

from typing import Any

LAYERS = 4
WINDOW = 32
INDEXED = 512  # tokens that a sparse attention selects: not all of a test's

COMMON: dict[str, Any] = dict(
    # Sizes.
    hidden_size=64, n_embd=64, d_model=64, model_dim=64, hidden_dim=64, dim=64, block_dim=64,
    num_hidden_layers=LAYERS, n_layer=LAYERS, n_layers=LAYERS, num_layers=LAYERS,
    num_transformer_layers=LAYERS,
    intermediate_size=96, n_inner=96, ff_intermediate_size=96, ffn_hidden_size=96,
    expert_ffn_hidden_size=48, moe_intermediate_size=48, moe_hidden_size=48,
    intermediate_size_mlp=96, mlp_hidden_size=96, shared_intermediate_size=48,
    shared_expert_intermediate_size=48, moe_shared_expert_intermediate_size=48,
    dense_intermediate_size=96, share_expert_dim=48, block_multiple_of=32,
    block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False,
    num_attention_heads=4, n_head=4, n_heads=4, num_heads=4,
    num_key_value_heads=2, num_kv_heads=2, n_kv_heads=2, num_attention_groups=2,
    head_dim=16, hidden_size_per_head=16, kv_channels=16, global_head_dim=32,
    vocab_size=128, num_vocab=128, embedding_size=128, vocab_size_per_layer_input=128,
    # Positions.
    max_position_embeddings=10_000, n_positions=10_000, n_ctx=10_000, model_max_length=10_000,
    block_size=10_000, original_max_position_embeddings=10_000,
    rope_theta=10_000.0, rope_local_base_freq=10_000.0, rotary_emb_base=10_000, rotary_pct=0.5,
    rope_local_theta=10_000, swa_rope_theta=10_000.0, partial_rotary_factor=0.5, rotary_dim=8,
    rope_traditional=False,
    # Norms, biases.
    rms_norm_eps=1e-5, layer_norm_epsilon=1e-5, layer_norm_eps=1e-5, norm_eps=1e-5,
    norm_epsilon=1e-5, layernorm_epsilon=1e-5, post_norm_eps=1e-5,
    attention_bias=False, mlp_bias=False, use_bias=False, use_qkv_bias=True, use_qk_norm=True,
    qk_norm=True, post_norm=True, conv_bias=True, use_conv_bias=True, tie_word_embeddings=False,
    # Experts: all of them for every token. A choice between them would turn rounding into jumps.
    num_experts=2, num_local_experts=2, n_routed_experts=2, moe_num_experts=2,
    num_experts_per_tok=2, num_experts_per_token=2, moe_topk=2, moe_top_k=2, moe_k=2,
    num_shared_experts=1, n_shared_experts=1, num_shared_expert=1,
    norm_topk_prob=True, routed_scaling_factor=1.0, n_group=1, topk_group=1, topk_method="noaux_tc",
    scoring_func="sigmoid", first_k_dense_replace=1, moe_layer_freq=1, decoder_sparse_step=1,
    mlp_only_layers=[], num_dense_layers=1, use_expert_bias=True, interleave_moe_layer_step=2,
    # Latent attention.
    q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    # Windows and chunks.
    sliding_window=WINDOW, sliding_window_size=WINDOW, attention_window_size=WINDOW,
    window_size=WINDOW, loop_window_size=WINDOW, attention_chunk_size=WINDOW,
    sliding_window_pattern=2,
    # Recurrent layers.
    state_size=8, ssm_state_size=8, mamba_d_state=8, conv_kernel=3, mamba_d_conv=3,
    time_step_rank=4, n_groups=1, mamba_n_groups=1, mamba_num_heads=4, mamba_n_heads=4,
    mamba_head_dim=16,
    mamba_d_head=16, mamba_d_ssm=64, mamba_proj_bias=False, mamba_conv_bias=True, mamba_expand=2,
    mamba_chunk_size=32, time_step_limit=(0.001, 100.0), conv_L_cache=3, conv1d_width=3,
    short_conv_kernel_size=3, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=32, linear_value_head_dim=16, linear_conv_kernel_dim=3,
    linear_allow_neg_eigval=True, full_attention_interval=2, layer_group_size=2, group_norm_size=2,
    a_low_rank_dim=8, v_low_rank_dim=8, gate_low_rank_dim=8, decay_low_rank_dim=8,
    # What multiplies, caps and scales.
    embedding_multiplier=1.0, attention_multiplier=0.25, residual_multiplier=1.0,
    logits_scaling=1.0, logit_scale=1.0, final_logit_softcapping=30.0, attn_logit_softcapping=50.0,
    query_pre_attn_scalar=16, dim_model_base=64, scale_depth=2.0, scale_emb=1.0,
    logits_soft_cap=30.0, gegelu_limit=20.0,
)  # fmt: skip
"""By the name of the field."""

EVEN_IF_NONE = {
    "num_key_value_heads", "head_dim", "max_position_embeddings", "num_experts", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank", "first_k_dense_replace",
}  # fmt: skip
"""Fields that are filled in although the type's default is None."""

MIXED = ["sliding_attention", "full_attention"] * (LAYERS // 2)
LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
ROPE = {"rope_theta": 10_000.0, "rope_type": "default"}
LLAMA4_ROPE = {
    **ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 10_000,
}  # fmt: skip
KDA = {
    "kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 2, "head_dim": 16,
    "short_conv_kernel_size": 3,
}  # fmt: skip

NESTED: dict[str, tuple[str, str]] = {
    "gemma3": ("gemma3_text", "ModelArgs"),
    "gemma3n": ("gemma3n", "TextConfig"),
    "gemma4": ("gemma4_text", "ModelArgs"),
    "kimi_k25": ("kimi_k25", "TextConfig"),
    "kimi_k3": ("kimi_k3", "TextArgs"),
    "kimi_vl": ("kimi_vl", "TextArgs"),
    "lfm2-vl": ("lfm2", "ModelArgs"),
    "llama4": ("llama4", "TextArgs"),
    "minimax_m3_vl": ("minimax_m3_vl", "TextArgs"),
    "mistral3": ("llama", "ModelArgs"),
    "muse_spark": ("muse_spark", "TextArgs"),
    "pixtral": ("llama", "ModelArgs"),
    "prism_hadamard_qwen35": ("qwen3_5", "TextModelArgs"),
    "qwen2_vl": ("qwen2", "ModelArgs"),
    "qwen3_5": ("qwen3_5", "TextModelArgs"),
    "qwen3_5_moe": ("qwen3_5", "TextModelArgs"),
    "qwen3_vl": ("qwen3", "ModelArgs"),
    "qwen3_vl_moe": ("qwen3_moe", "ModelArgs"),
}
"""Where the fields of `text_config` are declared: module and class."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "afm7": dict(num_kv_reuse_layers=1),
    "afmoe": dict(layer_types=MIXED),
    "baichuan_m1": dict(sliding_window_layers=[0, 2], conv_window=2),
    "dbrx": dict(
        ffn_config=dict(ffn_hidden_size=96, moe_num_experts=2, moe_top_k=2),
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10_000.0),
    ),
    "deepseek_v2": dict(
        rope_scaling={"type": "yarn", "factor": 2.0, "mscale_all_dim": 1.0, "mscale": 1.0,
                      "original_max_position_embeddings": 5_000},
        topk_method="gready", scoring_func="softmax",
    ),
    "deepseek_v32": dict(index_head_dim=16, index_n_heads=4, index_topk=INDEXED),
    "exaone4": dict(sliding_window_pattern="LG", rope_scaling=None),
    "exaone_moe": dict(layer_types=MIXED, is_moe_layer=[False, True, True, True]),
    "gear": dict(
        layer_types=["conv_mixer", "sliding_attention", "full_attention", "full_attention"],
    ),
    "gemma3n": dict(
        layer_types=MIXED, num_kv_shared_layers=2, activation_sparsity_pattern=[0.0] * LAYERS,
        hidden_size_per_layer_input=16, altup_num_inputs=2, altup_coef_clip=120.0,
        altup_correct_scale=True, altup_active_idx=0, laurel_rank=8,
    ),
    "gemma4_text": dict(
        layer_types=MIXED, num_kv_shared_layers=2, hidden_size_per_layer_input=16,
    ),
    "glm4_moe": dict(rope_scaling=None),
    "glm_moe_dsa": dict(
        index_head_dim=16, index_n_heads=4, index_topk=INDEXED, rope_parameters=ROPE,
    ),
    "granitemoehybrid": dict(
        layer_types=["mamba", "attention"] * 2, mamba_n_heads=4, mamba_d_head=16,
        mamba_proj_bias=False, mamba_d_state=8, mamba_d_conv=3, mamba_n_groups=1,
        mamba_conv_bias=True, num_local_experts=2, shared_intermediate_size=48,
    ),
    "hunyuan": dict(use_mixed_mlp_moe=True, use_cla=True, cla_share_factor=2,
                    rope_scaling={"alpha": 1.0, "factor": 1.0, "type": "dynamic"}),
    "jamba": dict(
        attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2,
    ),
    "kimi_k3": dict(linear_attn_config=KDA, hidden_act="situ", activation_situ_beta=1.0,
                    activation_situ_linear_beta=1.0),
    "kimi_linear": dict(linear_attn_config=KDA),
    "laguna": dict(layer_types=MIXED),
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2, intermediate_size=96),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "llama": dict(layer_types=MIXED, sliding_window=WINDOW),
    "llama4": dict(rope_scaling=None, num_experts_per_tok=1),
    "llama4_text": dict(no_rope_layers=[1, 1, 1, 0], rope_scaling=None),
    "longcat_flash": dict(
        attention_method="MLA", zero_expert_type="identity", zero_expert_num=0, num_layers=2,
        mla_scale_q_lora=True, mla_scale_kv_lora=True,
    ),
    "longcat_flash_ngram": dict(
        zero_expert_num=0, num_layers=2, mla_scale_q_lora=True, mla_scale_kv_lora=True,
    ),
    "mellum": dict(
        layer_types=MIXED, rope_parameters=dict.fromkeys(MIXED, ROPE),
    ),
    "mimo_v2_flash": dict(
        hybrid_layer_pattern=[1, 0, 1, 0], moe_layer_freq=[0, 1, 1, 1],
        add_swa_attention_sink_bias=True, add_full_attention_sink_bias=True,
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, swa_v_head_dim=16,
    ),
    "minicpm3": dict(
        rope_scaling={"original_max_position_embeddings": 10_000, "short_factor": [1.0] * 4,
                      "long_factor": [1.0] * 4},
    ),
    "minimax_m3_vl": dict(
        index_n_heads=2, index_head_dim=16, index_block_size=32, index_topk_blocks=12,
        layer_types=["sparse", "full_attention"] * 2,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
    ),
    "ministral3": dict(rope_parameters=LLAMA4_ROPE, layer_types=MIXED, sliding_window=WINDOW),
    "mistral4": dict(rope_parameters=LLAMA4_ROPE),
    "muse_glimmer": dict(output_multiplier=1.0, layer_types=MIXED),
    "muse_spark": dict(
        rope_parameters=ROPE, layer_types=MIXED, layer_rope_theta=[10_000.0, 0.0] * 2,
        output_multiplier=1.0, num_shared_experts=0, qk_scale_factor=1.5,
    ),
    "nanbeige": dict(num_loops=2),
    "nemotron": dict(hidden_act="relu2"),
    "nemotron-nas": dict(
        block_configs=[
            dict(attention=dict(n_heads_in_group=2), ffn=dict(ffn_mult=1.0)),
            dict(attention=dict(no_op=True), ffn=dict(ffn_mult=1.0)),
            dict(attention=dict(replace_with_linear=True), ffn=dict(no_op=True)),
            dict(attention=dict(n_heads_in_group=4), ffn=dict(replace_with_linear=True)),
        ],
    ),
    "nemotron_h": dict(
        hybrid_override_pattern=["M", "*", "E", "-", "*"], n_group=1, topk_group=1,
        norm_topk_prob=True, routed_scaling_factor=1.0, moe_shared_expert_intermediate_size=48,
    ),
    "openelm": dict(
        ffn_dim_divisor=16, num_query_heads=[4] * LAYERS, num_kv_heads=[2, 2, 4, 4],
        ffn_multipliers=[1.0, 1.5, 1.5, 2.0],
    ),
    "phi3small": dict(dense_attention_every_n_layers=2, blocksparse_block_size=32),
    "plamo": dict(num_key_value_heads=1, n_shared_head=4),
    "prism_hadamard_qwen35": dict(
        hidden_size=128, schema_version=1, tensor_namespace="mlx-lm-text",
        quantization={"bits": 2, "group_size": 128, "mode": "affine"},
        modules=[dict(path="model.layers.1.self_attn.q_proj", embedding=False, dtype="float16",
                      block=0)],
    ),
    "qwen3": dict(rope_theta=10_000.0),
    "qwen3_5_moe": dict(num_experts=2),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "spark2_5": dict(rope_parameters=dict.fromkeys(MIXED, ROPE)),
    "step3p5": dict(layer_types=MIXED),
}  # fmt: skip
"""By model type (or, for nested text settings, the module that declares them)."""
