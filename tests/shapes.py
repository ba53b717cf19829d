"""Shapes of the tiny parents, by name. Without any library: the process that only deals out tests reads them too."""

SHAPES = {
    "mha": {"num_attention_heads": 4, "num_key_value_heads": 4},
    "mha-tied-biased": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "gqa-wide-heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16},
    "gqa-tied-llama3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 7},
    "qwen2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24},
    "gpt2": {
        "num_attention_heads": 4,
        "n_inner": 96,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "neox": {"num_attention_heads": 4},
    "neox-serial": {"num_attention_heads": 4, "use_parallel_residual": False, "attention_bias": False},
}
VARIANTS = tuple(SHAPES)
