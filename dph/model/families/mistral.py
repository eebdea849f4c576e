"""Mistral, of the versions whose sliding window is not shorter than their context (from 7B v0.2 on)."""

from dph.model.families import Family

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    constants={"norm": "rms", "qk_norm": False, "qkv_bias": False, "out_bias": False, "ffn_bias": False},
)
