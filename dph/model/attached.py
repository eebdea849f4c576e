"""Causal language models of transformers with reward heads: GPT-2, GPT-NeoX, OPT, Gemma, Phi and others.

Their networks are those of transformers, frozen (``dph.model.attached_backbone``); heads, judging and training of heads
are those of :class:`dph.Model`. :func:`dph.attach` makes one.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dph._weights import check_tensors, read_tensors, read_weight_files
from dph.errors import UserError, one_line, shown
from dph.model.attached_backbone import AttachedBackbone, Observer
from dph.model.config import SIZES, HeadFields, check_integer, hub_arguments, read_fields
from dph.model.head_file import HeadFiles, records_beside
from dph.model.judging import JudgingModel
from dph.model.padded_batch import PaddedBatch

log = logging.getLogger(__name__)

LOGITS = 2**25  # elements of logits that are computed at a time
VOLATILE = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "name_or_path", "use_cache")
"""Settings of a network's configuration that do not change its states."""


class AttachedConfig(HeadFields, PretrainedConfig):
    """Configuration of an :class:`AttachedModel`: that of its network, and the reward heads.

    Args:
        network: configuration of the network, with its ``model_type``.
        hidden_size, num_hidden_layers, vocab_size, num_attention_heads, head_dim: of the network.
        embedding_size: E, width of the states that the language-model head multiplies.
        block_weights: entries of the weights of a block, for estimates.
        shares_prompts: whether prompts are computed once, into the network's cache.
        intermediate_size: F of the SwiGLU pooler.
        initializer_range: standard deviation of fresh weights of heads.
        others: as those of :class:`dph.ModelConfig`.

    Raises UserError for values of another type or out of range.
    """

    model_type = "dph_attached"
    projection_weights = 0

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        vocab_size: int = 1,
        embedding_size: int = 1,
        hidden_size: int = 1,
        intermediate_size: int = 1,
        num_hidden_layers: int = 1,
        num_attention_heads: int = 1,
        head_dim: int = 2,
        block_weights: int = 0,
        shares_prompts: bool = True,
        initializer_range: float = 0.02,
        reward_heads: Iterable[str] = (),
        task_heads: Iterable[str] = (),
        task_head_forms: dict[str, dict[str, Any]] | None = None,
        reward_pooler: str = "swiglu_bert",
        reward_layer: int | list[int] = -1,
        reward_standardised: bool = False,
        reward_members: int = 1,
        reward_dropout: float = 0.1,
        max_position_embeddings: int | None = None,
        im_end_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if network is not None and not isinstance(network, dict):
            raise UserError(f"network: expected the configuration of a model, got {shown(network)}")
        self.network = {} if network is None else network
        sizes = {"vocab_size": vocab_size, "embedding_size": embedding_size, "hidden_size": hidden_size}
        sizes |= {"intermediate_size": intermediate_size, "num_hidden_layers": num_hidden_layers}
        for name, value in {**sizes, "num_attention_heads": num_attention_heads, "head_dim": head_dim}.items():
            check_integer(name, value, *SIZES[name])
            setattr(self, name, value)
        check_integer("block_weights", block_weights, 0, 2**63 - 1)
        if not isinstance(shares_prompts, bool):
            raise UserError(f"shares_prompts: expected true or false, got {shown(shares_prompts)}")
        if not isinstance(initializer_range, Real) or isinstance(initializer_range, bool) or not initializer_range >= 0:
            raise UserError(f"initializer_range: expected a number of at least 0, got {shown(initializer_range)}")
        if max_position_embeddings is not None:
            check_integer("max_position_embeddings", max_position_embeddings, 1, 2**31 - 1)
        self.block_weights = block_weights
        self.shares_prompts = shares_prompts
        self.initializer_range = initializer_range
        self._set_rewards(
            reward_heads=reward_heads,
            task_heads=task_heads,
            task_head_forms=task_head_forms,
            reward_pooler=reward_pooler,
            reward_layer=reward_layer,
            reward_standardised=reward_standardised,
            reward_members=reward_members,
            reward_dropout=reward_dropout,
        )
        self.max_position_embeddings = max_position_embeddings
        self.im_end_token_id = im_end_token_id
        if im_end_token_id is not None:
            check_integer("im_end_token_id", im_end_token_id, 0, vocab_size - 1)
        self._check_rewards()
        super().__init__(**{**kwargs, "tie_word_embeddings": False})  # the network ties its own


class AttachedModel(HeadFiles, JudgingModel):
    """A frozen causal language model of transformers with reward heads.

    ``judge``, ``score``, ``rewards``, ``save_head`` and ``load_head``, :func:`dph.best_of_n` and the commands work as
    with :class:`dph.Model`; of the stages only ``head`` trains it. A call and ``generate`` are the network's own.

    Args:
        config: of the network and the heads.
        network: with its weights; None for one whose weights the caller loads.
    """

    config_class = AttachedConfig
    config: AttachedConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"

    def __init__(self, config: AttachedConfig, network: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.all_tied_weights_keys: dict[str, str] = {}  # the network's tensors are saved once
        self.backbone = AttachedBackbone(_new_network(config) if network is None else network, config.shares_prompts)
        self._add_heads()
        for module in self.heads.modules():
            self._init_weights(module)
        self.heads.to(self.device, self.dtype)
        self.register_load_state_dict_pre_hook(_before_loading)

    @classmethod
    def from_network(cls, network: PreTrainedModel, **fields: Any) -> AttachedModel:
        """Return a model of a network, which becomes frozen, after trying the network out on a few tokens.

        Args:
            network: causal language model of transformers, of the class that ``AutoModelForCausalLM`` opens.
            fields: of the heads (``reward_heads``, ...), as those of :class:`AttachedConfig`.

        Raises UserError for an encoder, several modalities, and networks whose logits do not follow from the states
        after the last block.
        """
        _check_kind(network.config)
        kind = network.config.model_type
        if type(network) is not _causal_classes()[type(network.config)]:
            raise UserError(f"{kind}: expected the class that AutoModelForCausalLM opens, got {type(network).__name__}")
        if network.get_output_embeddings() is None:
            raise UserError(f"{kind}: expected a model with output embeddings, got {type(network).__name__}")
        backbone = AttachedBackbone(network)
        backbone.try_out()
        model = cls(_config_for(backbone, fields), network)
        model.name_or_path = model.config.name_or_path = str(network.name_or_path)
        model._mark_untrained({f"heads.{name}" for name, _ in model.heads.named_parameters()})
        return model.eval()

    @classmethod
    def from_transformers(
        cls, path: str | os.PathLike, *, dtype: torch.dtype | str | None = None, **options: Any
    ) -> AttachedModel:
        """Return a model of a network in a directory or on the hub, whose weights are safetensors.

        Args:
            path: of the network.
            dtype: of its weights; None or "auto" for that of its configuration.
            options: arguments for downloads, and fields as those of :meth:`from_network`.

        Raises UserError as :meth:`from_network`, and for broken files and missing weights. Code that comes with a model
        is refused.
        """
        from transformers import AutoModelForCausalLM

        hub = hub_arguments(options)
        fields = {name: value for name, value in options.items() if name not in hub}
        read_fields(path, **hub)  # for its errors, before transformers reads the file
        files = read_weight_files(path, **hub)
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, **hub)
            _check_kind(config)
            settings = {"config": config, "dtype": dtype or "auto", "use_safetensors": True, "trust_remote_code": False}
            network, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **settings, **hub)
            faulty = [*sorted(info["missing_keys"]), *(key[0] for key in info["mismatched_keys"]), *info["error_msgs"]]
            if not faulty:
                model = cls.from_network(network, **fields)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except Exception as error:  # of any kind, from settings and weights that transformers cannot use
            got = f"{type(error).__name__}: {one_line(error, 300)}"
            raise UserError(f"{path}: expected a model that transformers opens, got {got}") from error
        if faulty:
            raise UserError(
                f"{files.path}: expected all weights of the model, got {len(faulty)} missing or of another shape, the "
                f"first is {shown(str(faulty[0]))}"
            )
        model.name_or_path = model.config.name_or_path = str(path)
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *_: Any,
        config: AttachedConfig | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> AttachedModel:
        """Load what :meth:`save_pretrained` wrote. Heads without weights are untrained, with a warning.

        Args:
            path: directory, or the name of a model on the hub.
            config: in place of the stored one.
            dtype: of the weights; None or "auto" for that of the file.
            options: arguments for downloads, and fields of :class:`AttachedConfig` in place of the stored ones; others
                are ignored.

        Raises UserError, which begins with the file, for broken files and missing weights.
        """
        hub, where = hub_arguments(options), f"{path}/config.json"
        if config is None:
            stored, known = read_fields(path, **hub), inspect.signature(AttachedConfig).parameters
            changes = {name: value for name, value in options.items() if name in known}
            try:
                config = AttachedConfig.from_dict({**stored, **changes})
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            except Exception as error:  # of any kind, from settings of transformers' own
                got = f"{type(error).__name__}: {one_line(error, 300)}"
                raise UserError(f"{where}: expected settings that transformers can use, got {got}") from error
        files = read_weight_files(path, **hub)
        try:
            model = cls(config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        expected = dict(model.named_parameters())
        check_tensors(expected, files.tensors, files.path, optional=lambda name: name.startswith("heads."))
        names = [name for name in expected if name in files.tensors]
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # None for "auto"
        weights = read_tensors({name: [name] for name in names}, files.tensors, dtype)
        for name in names:
            expected[name].data = weights.pop(name)
        missing = expected.keys() - set(names)
        for name in missing:
            expected[name].data = expected[name].data.to(model.dtype)
        model.name_or_path = model.config.name_or_path = str(path)
        model._mark_untrained(missing)
        model.head_records |= records_beside(path)
        return model.eval()

    def save_pretrained(self, directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save network and heads, without the weights of ``untrained_heads``: they load as untrained again."""
        weights = self._trained_weights(kwargs.pop("state_dict", None) or dict(self.named_parameters()))
        return super().save_pretrained(directory, *args, state_dict=weights, save_original_format=False, **kwargs)

    def save_family(self, directory: str | os.PathLike) -> None:
        """Write a directory of the network alone, which transformers opens; heads are left out with a warning."""
        if self.head_names:
            log.warning("reward heads %s are left out: the family's layout has none", ", ".join(self.head_names))
        self.backbone.network.save_pretrained(directory)

    def save_official(self, directory: str | os.PathLike) -> None:
        """Raise UserError: the released layout has networks of our own alone."""
        kind = self.config.network.get("model_type")
        raise UserError(f"model: expected a network of our own for the released layout, got one of type {kind}")

    def remade(self, config: AttachedConfig) -> AttachedModel:
        """Return a model with the same network and the heads of another configuration."""
        return AttachedModel(config, self.backbone.network)

    def get_input_embeddings(self) -> Any:
        """Return the network's token embedding."""
        return self.backbone.embedding

    def get_output_embeddings(self) -> Any:
        """Return the network's language-model head."""
        return self.backbone.network.get_output_embeddings()

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> str | None:
        """Accept any: the network has its own."""
        return attn_implementation

    @property
    def output_proj(self) -> Callable[[Tensor], Tensor]:
        """Function from states [.., C] to the [.., E] that the language-model head multiplies."""
        return self.backbone.project

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the network's own output; without ``position_ids`` those of the tokens that are no padding."""
        takes_positions = "position_ids" in self.backbone.accepts
        if position_ids is None and attention_mask is not None and input_ids is not None and takes_positions:
            counted = attention_mask.long().cumsum(-1) - 1
            position_ids = counted.clamp(min=0)[:, -input_ids.shape[1] :]
        if position_ids is not None:
            kwargs["position_ids"] = position_ids
        return self.backbone.network(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the network's own ``generate`` does."""
        return self.backbone.network.generate(*args, **kwargs)

    def decoder(self, ids: Tensor, mask: Tensor, max_new_tokens: int, copies: int) -> Callable[[Tensor], Tensor]:
        """Read prompts but for their last tokens, and return a function that continues them token by token.

        Args:
            ids, mask: prompts [B, S], padded on the left.
            max_new_tokens: most tokens of an answer.
            copies: answers per prompt.

        Returns a function from the next tokens [B * copies, 1], at first the prompts' last ones, to the logits
        [B * copies, V] after them.

        Raises ValueError if an answer might leave the network's context.
        """
        limit, longest = self.config.max_position_embeddings, int(mask.sum(1).max())
        if limit is not None and longest + max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens: expected at most {max(limit - longest, 0)}, of {limit} "
                f"(config.max_position_embeddings) less a prompt of {longest}, got {max_new_tokens}"
            )
        advance = self.backbone.continued(ids, mask, copies)
        return lambda tokens: self.backbone.logits(advance(tokens))

    def _hidden(self, inputs: Tensor, padded: PaddedBatch, *, observe: Observer | None = None) -> Tensor:
        return self.backbone(padded.rows(inputs), padded.layout(), observe=observe)

    def _logprobs(self, states: Tensor, targets: Tensor, **_: Any) -> Tensor:
        """Log-probabilities [R] fp32 of targets [R] after states [R, E], by the network's own logits."""
        rows, logprobs = max(1, LOGITS // self.config.vocab_size), []
        for some, wanted in zip(states.split(rows), targets.split(rows), strict=True):
            normed = self.backbone.logits(some).float().log_softmax(-1)
            logprobs.append(normed.gather(-1, wanted[:, None]).squeeze(-1))
        return torch.cat(logprobs)


def _before_loading(model: AttachedModel, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before weights are loaded into a model: mark heads as trained."""
    model._mark_loaded(state.keys(), prefix)


def _causal_classes() -> Mapping[type, type]:
    """Return transformers' classes of causal language models by class of configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING


def _check_kind(config: PretrainedConfig) -> None:
    """Raise UserError for a configuration of anything but a causal language model of text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(f"{kind}: expected a causal language model, got an encoder with a decoder")
    encodes = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", True) is False
    if encodes or type(config) not in _causal_classes():
        raise UserError(f"{kind}: expected a causal language model, got another kind, without logits of next tokens")
    if config.get_text_config() is not config:
        raise UserError(f"{kind}: expected a model of text alone, got one of several modalities")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{kind}: quantization_config: expected none, got quantised weights")


def _config_for(backbone: AttachedBackbone, fields: Mapping[str, Any]) -> AttachedConfig:
    """Return the configuration of a model of this backbone, with these fields."""
    network = backbone.network
    theirs, output = network.config, network.get_output_embeddings()
    kept = {name: value for name, value in theirs.to_diff_dict().items() if name not in VOLATILE}
    kept = json.loads(json.dumps({**kept, "model_type": theirs.model_type}, sort_keys=True))
    inner, heads = getattr(theirs, "intermediate_size", None), getattr(theirs, "num_attention_heads", 1)
    entries = sum(p.numel() for p in backbone.blocks.parameters() if p.ndim > 1)
    own = {
        "network": kept,
        "vocab_size": len(output.weight),
        "embedding_size": output.weight.shape[1],
        "hidden_size": theirs.hidden_size,
        "intermediate_size": inner if isinstance(inner, int) else 4 * theirs.hidden_size,
        "num_hidden_layers": len(backbone.blocks),
        "num_attention_heads": heads,
        "head_dim": max(getattr(theirs, "head_dim", None) or theirs.hidden_size // heads, 2),
        "block_weights": entries // max(len(backbone.blocks), 1),
        "shares_prompts": backbone.shares_prompts,
        "max_position_embeddings": backbone.context,
    }
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        own[name] = getattr(theirs, name, None)
    return AttachedConfig(**{**own, **fields})


def _new_network(config: AttachedConfig) -> PreTrainedModel:
    """Return a network without drawn weights: they are loaded next."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    kind = config.network.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise UserError(f"network.model_type: expected a type that transformers opens, got {shown(kind)}")
    try:
        theirs = CONFIG_MAPPING[kind].from_dict(_with_floats(config.network))
        _check_kind(theirs)
        with no_init_weights():
            network = AutoModelForCausalLM.from_config(theirs, dtype=torch.get_default_dtype(), trust_remote_code=False)
        network.tie_weights()
        return network
    except UserError as error:
        raise UserError(f"network.{error}") from error
    except Exception as error:  # of any kind, from settings that transformers cannot use
        got = f"{type(error).__name__}: {one_line(error, 300)}"
        raise UserError(f"network: expected settings that transformers can use, got {got}") from error


def _with_floats(value: Any) -> Any:
    """Return JSON with the floating-point numbers that it lacks in place of transformers' objects for them."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _with_floats(item) for key, item in value.items()}
    return list(map(_with_floats, value)) if isinstance(value, list) else value


AutoConfig.register(AttachedConfig.model_type, AttachedConfig)
