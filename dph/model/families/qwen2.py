"""Qwen 1.5, Qwen2 and Qwen2.5 (dense): queries, keys and values have biases."""

from dph.model.families import Family

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    constants={"norm": "rms", "qk_norm": False, "qkv_bias": True, "out_bias": False, "ffn_bias": False},
)
