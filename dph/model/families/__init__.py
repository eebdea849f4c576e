"""Families of other makers' models that run natively: a file of declarations each.

A new family needs a file with a :class:`Family`, and its name in ``dph.model.config.FAMILIES``. Most have the names of
Llama's weights and settings, which are the defaults here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LLAMA_WEIGHTS: Mapping[str, str] = {
    "model.embed_tokens.weight": "backbone.embedding.weight",
    "model.layers.{}.input_layernorm.weight": "backbone.blocks.{}.attention_norm.weight",
    "model.layers.{}.self_attn.q_proj.{}": "backbone.blocks.{}.attention.qkv.{}",
    "model.layers.{}.self_attn.k_proj.{}": "backbone.blocks.{}.attention.qkv.{}",
    "model.layers.{}.self_attn.v_proj.{}": "backbone.blocks.{}.attention.qkv.{}",
    "model.layers.{}.self_attn.q_norm.weight": "backbone.blocks.{}.attention.q_norm.weight",
    "model.layers.{}.self_attn.k_norm.weight": "backbone.blocks.{}.attention.k_norm.weight",
    "model.layers.{}.self_attn.o_proj.{}": "backbone.blocks.{}.attention.out.{}",
    "model.layers.{}.post_attention_layernorm.weight": "backbone.blocks.{}.ffn_norm.weight",
    "model.layers.{}.mlp.up_proj.{}": "backbone.blocks.{}.ffn.fc1.{}",
    "model.layers.{}.mlp.gate_proj.{}": "backbone.blocks.{}.ffn.fc1.{}",
    "model.layers.{}.mlp.down_proj.{}": "backbone.blocks.{}.ffn.fc2.{}",
    "model.norm.weight": "backbone.output_norm.weight",
    "lm_head.weight": "lm_head.weight",
}

LLAMA_FIELDS: Mapping[str, str] = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "initializer_range",
    "rms_norm_eps": "layer_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
    "dtype": "dtype",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one ``model_type`` of transformers that this package computes itself, as data.

    Attributes:
        model_type: in config.json.
        architecture: class of transformers that opens a directory of the family.
        constants: fields of ``ModelConfig`` that are the same in all models of the family.
        switches: further fields of their configuration, each the name of several fields of ``ModelConfig``.
        weights: table of the weights' names.
        fields: fields of their configuration and of ``ModelConfig``.
        ignored: pattern of names in their files that hold no weights, but tables that follow from the configuration.
    """

    model_type: str
    architecture: str
    constants: Mapping[str, Any]
    switches: Mapping[str, Sequence[str]] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=lambda: LLAMA_WEIGHTS)
    fields: Mapping[str, str] = field(default_factory=lambda: LLAMA_FIELDS)
    ignored: str = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
