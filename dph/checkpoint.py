"""Conversion of released checkpoint layouts, both ways: pure renaming, splitting and joining of tensors."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dph._layouts import names_of, renamed
from dph.errors import UserError, shown

RELEASED = "lsw_transformer"
"""Model type of the released directories."""

# Official name -> own name; {} stands for a block number, a reward head's name or a pooler's index.
RENAMED = {
    "model.input_embedding.embedding.weight": "backbone.embedding.weight",
    "model.input_proj.weight": "backbone.input_proj.weight",
    "model.input_norm.{}": "backbone.input_norm.{}",
    "model.output_norm.{}": "backbone.output_norm.{}",
    "model.blocks.{}.att_norm.{}": "backbone.blocks.{}.attention_norm.{}",
    "model.blocks.{}.att.proj_q.{}": "backbone.blocks.{}.attention.qkv.{}",
    "model.blocks.{}.att.proj_k.{}": "backbone.blocks.{}.attention.qkv.{}",
    "model.blocks.{}.att.proj_v.{}": "backbone.blocks.{}.attention.qkv.{}",
    "model.blocks.{}.att.proj_o.{}": "backbone.blocks.{}.attention.out.{}",
    "model.blocks.{}.ffn_norm.{}": "backbone.blocks.{}.ffn_norm.{}",
    "model.blocks.{}.ffn.{}.{}": "backbone.blocks.{}.ffn.{}.{}",
    "head_proj.weight": "output_proj.weight",
    "pooler_pipeline.{}.{}": "heads.shared.pooler.{}.{}",
    "reward_heads.{}.weight": "heads.shared.reward.{}.weight",
}
JOINED = ("proj_q", "proj_k", "proj_v")  # row blocks of qkv, in this order


def own_name(name: str) -> str:
    """Return the own name of a tensor of the released layout; ValueError if it has none."""
    if (own := renamed(name, RENAMED)) is None:
        raise ValueError(f"{name}: expected a name of the checkpoint layout, such as {next(iter(RENAMED))}")
    return own


def from_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights (or gradients) of the released ``lsw_transformer`` layout to own names; q, k and v are joined.

    Raises ValueError for a name that the layout lacks, and if one of q, k and v comes without the others.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        target = own_name(name)
        if ".attention.qkv." not in target:
            own[target] = tensor
        elif target not in own:
            joined_names = [re.sub(r"proj_[qkv]", projection, name) for projection in JOINED]
            if missing := [joined for joined in joined_names if joined not in tensors]:
                raise ValueError(f"{name}: expected {' and '.join(missing)} with it, got none")
            own[target] = torch.cat([tensors[joined] for joined in joined_names])
    return own


def to_official(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Invert :func:`from_official`. ValueError for heads with a pooler of their own, which the layout lacks.

    ``lm_head.weight`` is left out: it is the embedding.
    """
    official: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight":
            continue
        names = names_of(name, RENAMED)
        if not names:
            raise ValueError(f"{name}: expected a name of the own layout, such as {next(iter(RENAMED.values()))}")
        blocks = [tensor] if len(names) == 1 else [rows.contiguous() for rows in tensor.chunk(len(names))]
        official |= dict(zip(names, blocks, strict=True))
    return official


# Official configuration key -> own key.
RENAMED_CONFIG = {
    "vocab_size": "vocab_size",
    "d_vocab": "embedding_size",
    "d_model": "hidden_size",
    "d_ffn": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "rope_base_freq": "rope_base",
    "rope_reversed": "rope_reversed",
    "init_std": "initializer_range",
    "reward_heads": "reward_heads",
    "reward_pooler": "reward_pooler",
    "reward_dropout": "reward_dropout",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
# Keys that only the released code reads: stored unchanged, and written back.
KEPT_CONFIG = (
    "recompute_kv", "rope_positions", "rope_yarn_a", "rope_yarn_b", "parent_embeddings", "trainable_embeddings"
)  # fmt: skip
NO_HEADS = {"reward_heads": None, "architectures": ["LSWTForCausalLM"]}
"""Keys of a model without reward heads, as the paper's scripts save it before alignment."""
LAYER_NORM_EPS = 1e-5
"""Value of every released model, which their configurations do not contain."""

# Fields of ModelConfig that are the same in every released model.
FORM = {
    "norm": "layer",
    "qk_norm": False,
    "rotary_scaling": None,
    "reward_layer": -1,
    "reward_standardised": False,
    "reward_members": 1,
    **dict.fromkeys(("qkv_bias", "out_bias", "ffn_bias", "embedding_projection", "tie_word_embeddings"), True),
}

# Options that no released model uses and this model lacks: any other value is an error.
FIXED_CONFIG = {
    "enable_bias": True,
    "gated_att": False,
    "gated_ffn": True,
    "n_registers": 0,
    "qk_norm": False,
    "rope_dynamic": False,
    "rope_ntk_scale": 1.0,
    **dict.fromkeys(
        ("dropout_att_mat", "dropout_att_out", "dropout_ffn_int", "dropout_ffn_out", "dropout_layers"), 0.0
    ),
}


def config_from_official(config: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of :class:`dph.ModelConfig` from a released ``config.json``; ValueError for options it lacks."""
    for key, value in FIXED_CONFIG.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json: expected {key} = {value}, got {config[key]!r}: not part of this model")
    own = {own: config[official] for official, own in RENAMED_CONFIG.items() if official in config}
    if "reward_heads" in own and own["reward_heads"] is None:
        own["reward_heads"] = []
    kept = {key: config[key] for key in KEPT_CONFIG if key in config}
    return {**own, "im_end_token_id": config.get("im_end_token_id"), "released": kept}


def config_to_official(config: Any) -> dict[str, Any]:
    """Return a released ``config.json`` from a :class:`dph.ModelConfig`; ValueError for settings that it lacks."""
    for name, value in FORM.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"config: expected {name} = {value}, as in the released layout, got {getattr(config, name)}"
            )
    if config.layer_norm_eps != LAYER_NORM_EPS or config.task_heads:
        raise ValueError(
            f"config: expected layer_norm_eps = {LAYER_NORM_EPS} and no task_heads, which the released layout lacks, "
            f"got {config.layer_norm_eps} and {config.task_heads}"
        )
    if (config.num_key_value_heads, config.head_dim * config.num_attention_heads) != (
        config.num_attention_heads,
        config.hidden_size,
    ):
        raise ValueError(
            f"config: expected as many key heads as num_attention_heads = {config.num_attention_heads}, and heads that "
            f"fill hidden_size, as in the released layout, got {config.num_key_value_heads} of {config.head_dim}"
        )
    renamed = {official: getattr(config, own) for official, own in RENAMED_CONFIG.items()}
    extra = {
        "model_type": RELEASED,
        "architectures": ["LSWTForDPH"],
        "im_end_token_id": config.im_end_token_id,
    }
    return {**FIXED_CONFIG, **config.released, **renamed, **extra, **({} if config.reward_heads else NO_HEADS)}


def init_embeddings(model: nn.Module, source: str | Path = "facebook/opt-125m") -> None:
    """Copy the token embedding of a transformers language model (on disk or hub, safetensors only) into ``model``.

    The paper starts from OPT-125m, whose table has unused rows after its vocabulary. The two chat tokens get these rows
    unchanged.

    Raises ValueError if the widths differ, the source has fewer rows, its weights contain no embedding or one that is
    not floating-point, or transformers cannot read it without code of its own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        # Nothing is computed with it, and others may be kernels of the hub.
        config._attn_implementation = config._experts_implementation = "eager"
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True, trust_remote_code=False
        )
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        got = shown(f"{type(error).__name__}: {error}")
        raise UserError(f"{source}: expected a language model that transformers reads, got {got}") from error
    embedding = loaded.get_input_embeddings()
    # A table that the file lacks is initialised at random by transformers, with only a warning.
    names = {name for name, module in loaded.named_modules() if module is embedding}
    if missing := [key for key in info["missing_keys"] if key.rpartition(".")[0] in names]:
        raise ValueError(f"{source}: expected weights with a token embedding, got none for {missing[0]}")
    _check_dtype(source, embedding.weight.shape)
    table, own = embedding.weight.detach(), model.get_input_embeddings().weight
    if table.shape[1] != own.shape[1] or table.shape[0] < own.shape[0]:
        raise ValueError(f"{source}: expected an embedding of at least {list(own.shape)}, got {list(table.shape)}")
    with torch.no_grad():
        own.copy_(table[: own.shape[0]])


def _check_dtype(source: str | Path, shape: torch.Size) -> None:
    """Raise UserError if a file of a folder has integers in a tensor of the embedding's shape: they would be cast."""
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                entry = file.get_slice(name)
                if entry.get_shape() == list(shape) and entry.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise UserError(f"{path}: {name}: expected a floating-point embedding, got {entry.get_dtype()}")
