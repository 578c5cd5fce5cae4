"""The shapes of `torch_models.py`: every family, with odd numbers on purpose."""


def families(s: int) -> dict[str, tuple[str, dict, dict]]:
    """{folder: (config class, its settings, how the files look)}; widths grow with `s`."""
    depth = {"num_hidden_layers": 1 + max(1, s // 2) + (s > 1)}
    llama = {
        "vocab_size": 131 * s, "hidden_size": 24 * s, "intermediate_size": 40 * s, **depth,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6 * s,
        "max_position_embeddings": 128, "rms_norm_eps": 2e-4, "bos_token_id": 1,
        "tie_word_embeddings": False,
    }  # fmt: skip
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    plain = {k: v for k, v in llama.items() if k != "head_dim"}
    qwen = {"num_attention_heads": 4, "num_key_value_heads": 1, "rms_norm_eps": 3e-4}
    neox = {
        "vocab_size": 107 * s, "hidden_size": 32 * s, "intermediate_size": 56 * s, **depth,
        "num_attention_heads": 2, "max_position_embeddings": 64, "rotary_pct": 0.25,
        "rotary_emb_base": 700.0, "layer_norm_eps": 2e-4,
    }  # fmt: skip
    opt = {
        "vocab_size": 131 * s, "hidden_size": 28 * s, "ffn_dim": 50 * s, **depth,
        "num_attention_heads": 4, "max_position_embeddings": 40, "dropout": 0.0,
        "word_embed_proj_dim": 28 * s,
    }  # fmt: skip
    olmoe = {
        "vocab_size": 101 * s, "hidden_size": 24 * s, "intermediate_size": 18 * s, **depth,
        "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 64,
        "num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 0.9, "norm_topk_prob": False,
        "rms_norm_eps": 2e-4,
    }  # fmt: skip
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    released = {"released": True}
    return {
        "llama": ("LlamaConfig", {**llama, **rope}, {"shard": True}),
        "llama_llama3_rope": (
            "LlamaConfig",
            {**llama, "rope_parameters": {**llama3, "rope_theta": 500.0}},
            {"dtype": "bfloat16", **released},
        ),
        "llama_linear_rope": (
            "LlamaConfig",
            {
                **llama,
                "attention_bias": True,
                "mlp_bias": True,
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            {"dtype": "float16", **released},
        ),  # fmt: skip
        "smollm2": (
            "LlamaConfig",
            {
                **llama,
                **rope,
                "vocab_size": 307,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "head_dim": 8 * s,
                "tie_word_embeddings": True,
                "bos_token_id": 1,
            },
            {"dtype": "bfloat16", "tokenizer": True, **released},
        ),  # fmt: skip
        "qwen2": (
            "Qwen2Config",
            {
                **plain,
                **rope,
                **qwen,
                "vocab_size": 293,
                "sliding_window": 5,
                "use_sliding_window": True,
                "max_window_layers": 1,
                "tie_word_embeddings": s == 1,
            },
            {"dtype": "bfloat16", "tokenizer": True, "shard": s > 1},
        ),  # fmt: skip
        "qwen3": (
            "Qwen3Config",
            {**llama, **rope, **qwen, "num_key_value_heads": 2, "head_dim": 12 * s},
            {},
        ),
        "gpt_neox": ("GPTNeoXConfig", neox, {"dtype": "float16", "buffers": True, **released}),
        "gpt_neox_sequential": (
            "GPTNeoXConfig",
            {
                **neox,
                "use_parallel_residual": False,
                "hidden_act": "gelu_fast",
                "rotary_pct": 0.5,
                "tie_word_embeddings": True,
            },
            {},
        ),  # fmt: skip
        "opt_pre": ("OPTConfig", opt, {"dtype": "float16"}),
        "opt_post": (
            "OPTConfig",
            {**opt, "do_layer_norm_before": False, "word_embed_proj_dim": 20 * s},
            {"dtype": "float16"},
        ),
        "olmoe": ("OlmoeConfig", olmoe, {"dtype": "bfloat16", **released}),
        "olmoe_norm": (
            "OlmoeConfig",
            {
                **olmoe,
                "num_experts": 7,
                "num_experts_per_tok": 3,
                "clip_qkv": None,
                "norm_topk_prob": True,
                "num_key_value_heads": 1,
                "intermediate_size": 11 * s,
            },
            {"dtype": "bfloat16"},
        ),  # fmt: skip
    }
