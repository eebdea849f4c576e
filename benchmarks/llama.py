"""Llama models of transformers with random weights, for benchmarks of families."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.train_step import MARKS

# Arguments of transformers' LlamaConfig.
TINY_LLAMA = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip
SMALL_LLAMA = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TINYLLAMA_1B = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4,
}  # fmt: skip


def save_llama(directory: Path, sizes: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> str:
    """Write a Llama with random weights, the same in every call, and return its directory."""
    torch.manual_seed(0)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    config = LlamaConfig(**sizes, tie_word_embeddings=False, **{name: MARKS[name] for name in names})
    with torch.device(device):
        LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return str(directory)
