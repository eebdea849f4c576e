"""Qwen3 (dense): the queries and keys of each head are normalised before their rotation."""

from dph.model.families import Family

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    constants={"norm": "rms", "qk_norm": True, "ffn_bias": False},
    switches={"attention_bias": ("qkv_bias", "out_bias")},
)
