"""Configuration of the model as a transformers class, which also reads that of released ``lsw_transformer`` models."""

import os
from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from dph.checkpoint import RELEASED, config_from_official, end_token
from dph_kernels.layout import Rotary

POOLERS = ("identity", "bert", "t5", "swiglu_bert", "swiglu_t5")
OPT_ROWS, OPT_END = 50_272, 50_266
"""Rows of OPT's embedding, and the unused row that the paper assigns to ``<|im_end|>``."""

# Arguments for downloads from the hub, passed on for each file.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class ModelConfig(PretrainedConfig):
    """Sizes and switches of :class:`dph.Model`; the defaults are the paper's 551M model (arXiv 2405.20053).

    Args:
        vocab_size: V, rows of the embedding.
        embedding_size: E, width of the embedding, projected up to C and back.
        hidden_size: C, width of the blocks.
        intermediate_size: F, width of the SwiGLU feed-forward and of the SwiGLU pooler.
        num_hidden_layers: number of blocks.
        num_attention_heads: H; C / H is the head dimension.
        rope_base: base of the rotary embedding.
        rope_reversed: positions count from the newest token backwards (every angle negated), as in the released models.
        layer_norm_eps: epsilon of every LayerNorm.
        initializer_range: standard deviation of fresh weights.
        reward_heads: names of the reward heads that share one pooler; () for none.
        task_heads: names of reward heads with a pooler each (paper 5.2.2).
        reward_pooler: identity, bert, t5, swiglu_bert or swiglu_t5.
        reward_dropout: dropout of the pooled state (and of the hidden state for the t5 kinds) in training.
        im_end_token_id: id of ``<|im_end|>``, the token whose hidden state is judged; if None, 50266 for an embedding
            of OPT's 50272 rows.
        released: keys of a released ``config.json`` that this model does not use, written back by ``save_official``.

    Raises ValueError for sizes that do not divide or are out of range, unknown poolers and duplicate names.
    """

    model_type = "dph"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers adds a list to it

    def __init__(
        self,
        vocab_size: int = 50_272,
        embedding_size: int = 768,
        hidden_size: int = 1536,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 18,
        num_attention_heads: int = 24,
        rope_base: float = 500_000.0,
        rope_reversed: bool = True,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        reward_heads: tuple[str, ...] = ("default",),
        task_heads: tuple[str, ...] = (),
        reward_pooler: str = "swiglu_bert",
        reward_dropout: float = 0.1,
        im_end_token_id: int | None = None,
        bos_token_id: int | None = 2,
        eos_token_id: int | None = 2,
        pad_token_id: int | None = 1,
        tie_word_embeddings: bool = True,
        released: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.embedding_size = embedding_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.rope_base = rope_base
        self.rope_reversed = rope_reversed
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.reward_heads = _names("reward_heads", reward_heads)
        self.task_heads = _names("task_heads", task_heads)
        self.reward_pooler = reward_pooler
        self.reward_dropout = reward_dropout
        self.im_end_token_id = OPT_END if im_end_token_id is None and vocab_size == OPT_ROWS else im_end_token_id
        self.released = released or {}
        self._check(tie_word_embeddings)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check(self, tied: bool) -> None:
        sizes = "vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_attention_heads"
        for name, least in (*((name, 1) for name in sizes), ("num_hidden_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not self.rope_base > 0:
            raise ValueError(f"rope_base: expected a number above 0, got {self.rope_base}")
        if not 0 <= self.reward_dropout < 1:
            raise ValueError(f"reward_dropout: expected a probability in [0, 1), got {self.reward_dropout}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size: expected a multiple of 2 * num_attention_heads = {2 * self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if self.reward_pooler not in POOLERS:
            raise ValueError(f"reward_pooler: expected one of {', '.join(POOLERS)}, got {self.reward_pooler!r}")
        names = self.reward_heads + self.task_heads
        if len(set(names)) != len(names) or any(not n or "." in n for n in names):
            raise ValueError(f"reward_heads, task_heads: expected different names without dots, got {names}")
        if not tied:
            raise ValueError("tie_word_embeddings: expected True (the head is the transposed embedding), got False")

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the fields of ``path``, converted to own names if it is a released ``lsw_transformer`` directory."""
        fields, rest = super().get_config_dict(path, **kwargs)
        return _own_fields(fields, path, kwargs), rest

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def memory_kind(self) -> str:
        """Kind of :class:`dph.Memory` that the model was trained with (``recompute_kv`` of a released one)."""
        return "hidden" if self.released.get("recompute_kv") else "kv"

    @property
    def rope(self) -> Rotary:
        """The rotary embedding of every block."""
        return Rotary(self.rope_base, self.rope_reversed)


def _names(field: str, names: Iterable[str]) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"{field}: expected a sequence of names, got {names!r}")
    return list(names)


class ReleasedConfig(ModelConfig):
    """Registered with transformers for released configurations, which it reads as a :class:`ModelConfig`."""

    model_type = RELEASED

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a :class:`ModelConfig`, with ``return_unused_kwargs`` also the unused arguments."""
        return ModelConfig.from_dict(_own_fields(config_dict, kwargs.get("name_or_path"), kwargs), **kwargs)


def _own_fields(fields: dict[str, Any], path: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Convert released fields to own names, and add the id of ``<|im_end|>`` from the tokenizer at ``path``."""
    if fields.get("model_type") != RELEASED:
        return fields
    own = {**config_from_official(fields), "model_type": ModelConfig.model_type}
    if own["im_end_token_id"] is None and path is not None:
        own["im_end_token_id"] = end_token(path, **hub_arguments(options))
    return own


def hub_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for downloads among ``options``."""
    return {name: options[name] for name in HUB_ARGUMENTS if name in options}


def with_config(path: str | os.PathLike, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of ``from_pretrained`` in which fields of the configuration have moved into ``config``."""
    if isinstance(kwargs.get("config"), PretrainedConfig):
        return kwargs
    source = kwargs.get("config") or path
    fields = {name: value for name, value in kwargs.items() if name not in ("config", "dtype")}
    config, rest = ModelConfig.from_pretrained(source, return_unused_kwargs=True, **fields)
    if "dtype" in kwargs:  # of the weights, not a field
        rest = {"dtype": kwargs["dtype"], **rest}
    return {**rest, "config": config}


for _config in (ModelConfig, ReleasedConfig):
    AutoConfig.register(_config.model_type, _config)
