"""Llama 1 to 3.x and models with its architecture, such as TinyLlama, SmolLM and SmolLM2."""

from dph.model.families import Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    constants={"norm": "rms", "qk_norm": False},
    switches={"attention_bias": ("qkv_bias", "out_bias"), "mlp_bias": ("ffn_bias",)},
)
