"""The language model with reward heads: backbone, language-model head, heads.

| part | shape | weights |
|---|---|---|
| embedding, up-projection, norm | [V, E], E -> C | ``backbone.embedding``, ``input_proj``, ``input_norm`` |
| blocks | x + attention(norm(x)), x + ffn(norm(x)) | ``backbone.blocks`` |
| norm, down-projection | C -> E | ``backbone.output_norm``, ``output_proj`` |
| language-model head | E -> V, with the weight of the embedding if tied | ``lm_head`` |
| reward heads | C -> 1 | ``heads`` |

Both projections and the norm between them are identities without ``config.embedding_projection``.
"""

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from dph import checkpoint
from dph._layouts import Pieces, blocks_of, names_of, pieces
from dph._weights import (
    TensorHeader,
    WeightFiles,
    check_tensors,
    read_tensors,
    read_weight_files,
    remove_copy,
    remove_tables,
)
from dph.devices import host_memory
from dph.errors import UserError, shown, shown_names
from dph.losses import IGNORED
from dph.model import saving
from dph.model.backbone import Backbone
from dph.model.config import DTYPES, FAMILIES, ModelConfig, hub_arguments, read_fields, with_config
from dph.model.generation_settings import allow_saving, read_generation_config
from dph.model.head_file import HeadFiles, records_beside
from dph.model.heads import Mix, Standardise
from dph.model.judging import JudgingModel
from dph.model.memory import Memory
from dph.model.padded_batch import (
    PaddedBatch,
    check_labels,
    check_tokens,
    checked_inputs,
    document_positions,
)
from dph_kernels import checks, dispatch
from dph_kernels.linear import apply_linear
from dph_kernels.transfer import to_device

log = logging.getLogger(__name__)

CAUSAL_NAME = "DPHForCausalLM"
EMBEDDING, HEAD = "backbone.embedding.weight", "lm_head.weight"
# Names of implementations of attention, and the backends of rope_attention.
ATTENTION = {
    "auto": "auto", "cpu": "cpu", "triton": "triton", "eager": "reference", "reference": "reference", "sdpa": "sdpa",
    "flash_attention_2": "flash", "flash": "flash",
}  # fmt: skip
# Layouts of directories by model_type: tables of the weights' names.
LAYOUTS = {
    ModelConfig.model_type: None,
    checkpoint.RELEASED: checkpoint.RENAMED,
    **{name: family.weights for name, family in FAMILIES.items()},
}


class Model(HeadFiles, JudgingModel, GenerationMixin):
    """Direct Preference Heads model (arXiv 2405.20053): a causal language model with reward heads.

    ``Model(ModelConfig(...))`` has fresh weights; ``Model.from_pretrained(path)`` reads the own format, a released
    ``lsw_transformer`` directory or one of a native family; ``AutoModelForCausalLM`` and ``generate`` work.

    The modules compute the tokens of a batch as rows [T, C] without padding: hooks receive those, not [B, S, C].
    """

    config_class = ModelConfig
    config: ModelConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # so that transformers' Trainer passes num_items_in_batch
    _no_split_modules = ("Block",)
    _tied_weights_keys = {HEAD: EMBEDDING}  # noqa: RUF012
    # Checked and reported here, by from_pretrained, in place of transformers' table.
    _keys_to_ignore_on_load_missing = [r"^heads\."]  # noqa: RUF012 - transformers adds to it
    _keys_to_ignore_on_load_unexpected = [r"^heads\."]  # noqa: RUF012

    def __init__(self, config: ModelConfig) -> None:
        _check_host_memory(config)
        super().__init__(config)
        self.backbone = Backbone(config)
        self.output_proj = nn.Identity()
        if config.embedding_projection:
            self.output_proj = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        device = "meta" if config.tie_word_embeddings else None
        self.lm_head = nn.Linear(config.embedding_size, config.vocab_size, bias=False, device=device)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self._add_heads()
        self.register_load_state_dict_pre_hook(_before_loading)
        self.post_init()
        if requested := self.config._attn_implementation:
            self.set_attn_implementation(requested)
        self.loss_type = "ForCausalLM"  # read by transformers' Trainer, which would guess it from the class's name
        eos = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = [token for token in dict.fromkeys([*eos, config.im_end_token_id]) if token is not None]
        self.generation_config.eos_token_id = ends or None  # plain ``generate`` stops at the end of an answer, too

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Do nothing: every saved folder names our classes."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Parameters that DistributedDataParallel leaves alone: ``forward`` never uses the reward heads."""
        return [name for name, _ in self.named_parameters() if name.startswith("heads.")]

    def _get_name(self) -> str:
        """Return the name by which transformers' Trainer finds the class among causal models."""
        return CAUSAL_NAME

    def _check_and_adjust_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> str | None:
        """Return the name of an implementation of attention, if it is one of ours; transformers calls this."""
        if attn_implementation is not None and attn_implementation not in ATTENTION:
            raise UserError(
                f"attn_implementation: expected one of {', '.join(ATTENTION)}, got {shown(attn_implementation)}"
            )
        return attn_implementation

    def set_attn_implementation(self, attn_implementation: str, *_: Any, **__: Any) -> None:
        """Choose the backend of attention by one of transformers' names or of ours (ATTENTION).

        Raises UserError for another name, RuntimeError if the backend cannot run here.
        """
        name = self._check_and_adjust_attn_implementation(attn_implementation)
        backend = ATTENTION[name] if name else "auto"
        dispatch.choose("rope_attention", self.device.type if self.device.type != "meta" else "cpu", backend)
        self.config._attn_implementation_internal = name
        for block in self.backbone.blocks:
            block.attention.backend = backend

    def _init_weights(self, module: nn.Module) -> None:
        """Draw fresh weights; those of a tied language-model head are the embedding's."""
        if isinstance(module, Standardise):
            nn.init.zeros_(module.mean)
            nn.init.ones_(module.deviation)
        elif isinstance(module, Mix):
            module.reset_parameters()
        elif module is not self.lm_head or not self.config.tie_word_embeddings:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding; if tied, its weight is also the language-model head's."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding; a tied language-model head takes over its weight."""
        self.backbone.embedding = value
        if self.config.tie_word_embeddings:
            self.lm_head.weight, self.lm_head.out_features = value.weight, len(value.weight)

    @property
    def base_model(self) -> "BaseModelView":
        """The model without its heads, as transformers and other libraries call it: tokens to last hidden states."""
        return BaseModelView(self)

    def remade(self, config: ModelConfig) -> "Model":
        """Return a model of another configuration with fresh weights, into which the caller loads this model's."""
        return Model(config)

    def explain(self, tokens: int = 4096, memory_kind: str | None = None) -> str:
        """Print and return the form of each block (fused or in parts), the backends of its operators, and why.

        Args:
            tokens: rows of the call in question. Grad mode, autocast and transforms are those around ``explain``.
            memory_kind: "kv" or "hidden" if the call has a memory.
        """
        from dph.model.explain import as_text, report_blocks

        text = as_text(report_blocks(self.backbone, tokens, memory_kind))
        print(text)
        return text

    # Loading and saving

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args: Any, **kwargs: Any) -> "Model":
        """Load the own format, a released ``lsw_transformer`` model or one of a native family; safetensors only.

        ``path`` is a directory or the name of a model on the hub. Native families are Llama, Mistral, Qwen2 and Qwen3
        (``dph.model.families``); settings that this model cannot compute, such as sliding windows, are refused. Weights
        are read in their dtype, or in that of ``dtype``; the peak of memory is their size.

        Keyword arguments named as fields of :class:`ModelConfig` override the configuration. Reward heads that the
        checkpoint lacks get fresh weights and a warning, and raise if they are used to score. No code of the folder or
        hub runs, whatever ``trust_remote_code`` is. ``ignore_mismatched_sizes`` is for reward heads: those of other
        sizes count as missing.

        Raises UserError, which begins with the file, for a broken configuration; for files without exactly the model's
        weights (reward heads apart) in a floating-point dtype of at least 16 bits; and for a generation_config.json
        that transformers cannot use.
        """
        loading_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("use_safetensors") not in (None, True) or kwargs.get("gguf_file") is not None:
            raise UserError("use_safetensors, gguf_file: expected True and None, got other formats: they are not read")
        kwargs |= {"use_safetensors": True, "trust_remote_code": False}
        hub, name = hub_arguments(kwargs), str(path)
        kind = read_fields(path, **hub).get("model_type")
        if kind not in LAYOUTS:
            raise UserError(f"{name}: expected a model of type {', '.join(LAYOUTS)}, got {_other_kind(kind, path)}")
        kwargs = {**with_config(path, kwargs), **hub}
        config = kwargs["config"]
        if "generation_config" not in kwargs:
            kwargs["generation_config"] = read_generation_config(path, hub)
            if kwargs["generation_config"] is None and kind != checkpoint.RELEASED:
                kwargs["generation_config"] = GenerationConfig.from_model_config(config)
        files = read_weight_files(path, kwargs.get("variant"), **hub)
        try:
            expected = cls.expected_weights(config)
        except UserError:
            raise
        except Exception as error:  # of any kind, from transformers' use of settings that are its own
            raise _faulty_setting(config, path, error) from error
        names = pieces(expected, LAYOUTS[kind])
        if kind in FAMILIES and config.tie_word_embeddings and names[EMBEDDING][0] not in files.tensors:
            head = names_of(HEAD, FAMILIES[kind].weights)  # the name under which some converters store it
            names[EMBEDDING] = head if head[0] in files.tensors else names[EMBEDDING]
        mismatched = bool(kwargs.get("ignore_mismatched_sizes"))
        headers = _checked_headers(kind, config, expected, names, files, mismatched)
        stored = {own: own_names for own, own_names in names.items() if headers.keys() >= set(own_names)}
        weights = read_tensors(stored, headers, _dtype(kwargs, config))
        if config.tie_word_embeddings:
            weights[HEAD] = weights[EMBEDDING]  # which transformers needs to offload both
        model, info = super().from_pretrained(None, *args, output_loading_info=True, state_dict=weights, **kwargs)
        model.name_or_path = model.config.name_or_path = name
        for head in model.heads.values():
            if head.standardise is not None:  # transformers makes all weights trainable
                head.standardise.requires_grad_(False)
        missing = expected.keys() - stored.keys()
        info["missing_keys"] = missing.union(info["missing_keys"])
        model._mark_untrained(missing)
        model.head_records |= records_beside(path)
        return (model, info) if loading_info else model

    @classmethod
    def expected_weights(cls, config: ModelConfig) -> dict[str, Tensor]:
        """Return the names and shapes of a model's weights, as tensors without memory (device ``meta``).

        A weight that several modules share has its first name.
        """
        one_block = copy.deepcopy(config)
        one_block.num_hidden_layers = min(1, config.num_hidden_layers)
        with torch.device("meta"):
            weights = dict(cls(one_block).named_parameters())
        expected: dict[str, Tensor] = {}
        for name, tensor in weights.items():
            if not name.startswith("backbone.blocks.0."):
                expected[name] = tensor
        for block in range(config.num_hidden_layers):
            for name, tensor in weights.items():
                if name.startswith("backbone.blocks.0."):
                    expected[name.replace(".0.", f".{block}.", 1)] = tensor
        return expected

    def save_pretrained(self, directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save in transformers' format, without the weights of ``untrained_heads``: they load as untrained again.

        A head whose weights have changed since it was loaded, by whatever loop, is trained.
        """
        weights = self._trained_weights(kwargs.pop("state_dict", None) or self.state_dict())
        allow_saving(self.generation_config)
        return super().save_pretrained(directory, *args, state_dict=weights, **kwargs)

    def save_official(self, directory: str | os.PathLike) -> None:
        """Write a directory in the released layout (``lsw_transformer``): config.json and model.safetensors.

        Untrained heads are left out, as by :meth:`save_pretrained`; without a trained one, config.json names no heads
        and the class of language models. Raises ValueError, before anything is written, for
        a model that the layout cannot represent: with task heads, another epsilon, or the form of another family.
        """
        saving.save_official(self, self._trained_weights(self.state_dict()), directory)

    def save_family(self, directory: str | os.PathLike, max_shard_size: str = "5GB") -> None:
        """Write a directory of the family that the model comes from, which transformers' own class opens.

        config.json, weights in files of at most ``max_shard_size``, generation_config.json; no tokenizer. Weights that
        were not trained are those of the original bit for bit. Reward heads are left out with a warning: the layout has
        none. Raises UserError, before anything is written, for a model of no family, for settings that have changed and
        that the family lacks, and for weights that its layout lacks.
        """
        family = FAMILIES.get(self.config.family)
        allow_saving(self.generation_config)
        saving.save_family(self, family, self.state_dict(), directory, max_shard_size)

    # Padded batches

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Memory | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and the loss if there are labels.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S'] with S' >= S, 0 for padding (on either side); columns before the last S are those
                that the memory has seen. Padding is neither computed nor stored; its logits are zero.
            labels: [B, S] int64, aligned with the tokens and shifted here; -100 is ignored.
            past_key_values: a :class:`dph.Memory`, read and updated, detached.
            use_cache: True without a memory creates one that holds all tokens.
            logits_to_keep: last columns to compute logits for; 0 for all, or the columns' indices.
            num_items_in_batch: divisor of the summed loss, for gradient accumulation; the number of labels if None.
            position_ids: [B, S], for rows of several documents: positions restart at 0 with each document, and tokens
                attend to their own document only. With a memory a row has to be one document.
            return_dict: False gives a tuple; None is the configuration's setting, as for ``output_hidden_states``.
            output_attentions: True is not supported.
            output_hidden_states: also return ``hidden_states``, the input of each block and the result. They have
                gradients, but the loss has none for them: the blocks read rows, not these.
            inputs_embeds: [B, S, E] embeddings in place of ``input_ids``.
            kwargs: ``cu_seq_lens_q`` [D + 1], the bounds of the documents in a single row, as transformers' collators
                give them for attention of variable length. Others, as ``cache_position``, are ignored, as by
                transformers' own models.

        Returns:
            ``logits`` [B, S, V], ``loss`` (mean over labels; NaN without any), ``past_key_values``, ``hidden_states``
            (L + 1 of [B, S, C], zeros in the padding).

        Raises ValueError if shapes do not fit, a token is not in the vocabulary (on the CPU), or the cache is not a
        :class:`dph.Memory`.
        """
        if labels is not None:
            inputs = checked_inputs(self.backbone.embedding.weight, input_ids, inputs_embeds)
            check_labels(labels, inputs, self.lm_head.out_features)
        read = self._read(
            input_ids, attention_mask, past_key_values, use_cache, position_ids, output_attentions,
            output_hidden_states, inputs_embeds, **kwargs,
        )  # fmt: skip
        states, loss = read.last_hidden_state, None
        if labels is not None:
            targets = labels[:, 1:]
            counted = targets != IGNORED
            logprobs = self._logprobs(states[:, :-1][counted], targets[counted])
            loss = -logprobs.sum() / (counted.sum() if num_items_in_batch is None else num_items_in_batch)
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0: all
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=apply_linear(self.lm_head, states[:, columns]),
            past_key_values=read.past_key_values,
            hidden_states=read.hidden_states,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _read(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Memory | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the states [B, S, E] that the language-model head multiplies; arguments as those of ``forward``."""
        if past_key_values is not None and not isinstance(past_key_values, Memory):
            raise ValueError(f"past_key_values: expected dph.Memory, got {type(past_key_values).__name__}")
        inputs, padded = self._padded(
            input_ids, attention_mask, position_ids, inputs_embeds, cu_seq_lens_q, output_attentions,
            slides=past_key_values is not None,
        )  # fmt: skip
        if past_key_values is None and use_cache:
            past_key_values = Memory(length=max(4096, inputs.shape[1]))
        if past_key_values is not None:
            padded.check_one_document()
        states = self._states_list(output_hidden_states)
        observe = None if states is None else lambda _, x: states.append(x)
        projected = padded.scatter(self.output_proj(self._hidden(inputs, padded, past_key_values, observe)))
        hidden_states = None if states is None else tuple(map(padded.scatter, states))
        return BaseModelOutputWithPast(projected, past_key_values, hidden_states)

    def _padded(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        cu_seq_lens_q: Tensor | None,
        output_attentions: bool | None,
        slides: bool = False,
    ) -> tuple[Tensor, PaddedBatch]:
        """Check arguments of ``forward``; return tokens or embeddings, and the batch without its padding.

        ``slides``: a memory is given, so that rows may be longer than the model's context.
        """
        inputs = checked_inputs(self.backbone.embedding.weight, input_ids, inputs_embeds)
        if output_attentions:
            raise ValueError("output_attentions: expected False, got True: no kernel of ours forms them")
        if not slides:
            self._check_length(inputs.shape[1])
        if position_ids is None and cu_seq_lens_q is not None:
            position_ids = document_positions(cu_seq_lens_q, inputs)
        return inputs, PaddedBatch.from_inputs(inputs, attention_mask, position_ids if inputs.shape[1] > 1 else None)

    def _states_list(self, output_hidden_states: bool | None) -> list[Tensor] | None:
        """Return a list for the blocks' inputs if the argument or the configuration requests them."""
        requested = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return [] if requested else None

    def _check_length(self, tokens: int) -> None:
        """Raise ValueError if rows of ``tokens`` are longer than the model was made for."""
        limit = self.config.max_position_embeddings
        if limit is not None and tokens > limit:
            raise ValueError(
                f"input_ids: expected at most {limit} tokens (config.max_position_embeddings), got {tokens}; a "
                "dph.Memory given as past_key_values slides over more"
            )

    def _hidden(
        self,
        inputs: Tensor,
        padded: PaddedBatch,
        memory: Memory | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Hidden states [T, C] of the tokens without padding; ``observe`` as in the backbone."""
        embedding = self.backbone.embedding
        if not inputs.is_floating_point() and dispatch.is_modified(embedding, nn.Embedding):
            inputs = embedding(inputs)  # with the padding, as hooks and replacements expect it
        rows = padded.rows(inputs)
        if memory is None:
            return self.backbone(rows, padded.layout(), observe=observe)
        layers = len(self.backbone.blocks)
        if memory.columns and len(memory) != layers:
            raise ValueError(f"past_key_values: expected a memory of {layers} layers, got one of {len(memory)}")
        layout = memory.begin(padded.counts).to(rows.device)
        hidden = self.backbone(rows, layout, memory.by_layer(padded.counts), observe)
        memory.end(padded.counts, padded.shape[1])
        return hidden

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Give plain ``generate()`` a memory that holds all tokens; repeat the streams of a given one for beams."""
        memory = model_kwargs.get("past_key_values")
        if isinstance(memory, Memory):
            memory._is_user_defined = True  # transformers' mark for a cache that outlives the call
            memory.batch_repeat_interleave(max(generation_config.num_beams, generation_config.num_return_sequences))
        elif memory is None and generation_config.use_cache is not False:
            length, embeddings = generation_config.max_length, model_kwargs.get("inputs_embeds")
            if embeddings is not None:  # transformers' length may not count them
                length += embeddings.shape[1]
            self._check_length(length)
            model_kwargs["past_key_values"] = Memory(length=length)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Like transformers' own, but raises ValueError if the memory has seen all of ``input_ids``."""
        if next_sequence_length is not None and next_sequence_length < 1:
            name, inputs = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
            raise ValueError(
                f"{name}: expected the {inputs.shape[1] - next_sequence_length} tokens that the memory has seen and at "
                f"least one more (or new tokens alone, with an attention_mask over all), got {inputs.shape[1]}"
            )
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    # Streams

    def stream_logprobs(
        self, tokens: Tensor, targets: Tensor, memory: Memory | None = None, *, statistics: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the targets of B streams, without logits.

        Args:
            tokens: [B, S] int64.
            targets: [B, S] int64, shifted already; -100 is ignored. On the model's device, or on the CPU, so that the
                host does not wait for the device.
            memory: read and updated, detached.
            statistics: also return entropies, and whether the most probable tokens are right.

        Returns:
            [R] fp32, for the targets that are not -100, row by row. With ``statistics``: (log-probabilities, entropy
            [R] in nats, most probable token is the target [R] bool), the last two without gradient.
        """
        checks.shape("tokens", tokens, "B", "S")
        check_tokens("tokens", tokens, self.lm_head.out_features)
        hidden, targets = self._hidden(tokens, PaddedBatch.from_inputs(tokens), memory), targets.flatten()
        rows = (targets != IGNORED).nonzero().flatten()
        states, targets = self.output_proj(hidden[to_device(rows, self.device)]), to_device(targets[rows], self.device)
        if not statistics:
            return self._logprobs(states, targets)
        logprobs, entropy, most_probable = self._logprobs(states, targets, statistics=True)
        return logprobs, entropy, most_probable == targets

    # Judging


class BaseModelView(nn.Module):
    """A model without its heads, made of the model's own modules: :attr:`Model.base_model`.

    The last hidden state is the one that the language-model head (``get_output_embeddings``) multiplies.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.config, self._read = model.config, model._read
        self.backbone, self.output_proj = model.backbone, model.output_proj
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        """Return ``last_hidden_state`` [B, S, E], ``past_key_values`` and ``hidden_states``.

        Arguments and errors are those of :meth:`Model.forward`, without labels.
        """
        return self._read(*args, **kwargs)


def _before_loading(model: Model, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before weights are loaded into a model: add the tied one, which files hold once, and mark heads as trained."""
    for tied, source in model._tied_weights_keys.items() if model.config.tie_word_embeddings else ():
        if f"{prefix}{source}" in state:
            state.setdefault(f"{prefix}{tied}", state[f"{prefix}{source}"])
    model._mark_loaded(state.keys(), prefix)


def _is_head(name: str) -> bool:
    """Whether a weight, by its own or its released name, belongs to a reward head, which may be missing."""
    return name.startswith(("heads.", "pooler_pipeline.", "reward_heads."))


def _other_kind(kind: Any, path: str | os.PathLike) -> str:
    """Return what a directory without a model of a known type holds, for a message."""
    if kind in CONFIG_MAPPING:
        return f"{kind} (dph.attach adds heads to causal language models of transformers)"
    if kind:
        return shown_names([kind])
    if (Path(path) / "model").is_dir():
        return f"the directory of a run: give {path}/model"
    return "a config.json without a model_type (a run that is not finished holds no model)"


def _dtype(options: dict[str, Any], config: ModelConfig) -> torch.dtype | None:
    """Return the dtype in which ``from_pretrained`` with these options reads weights; None for that of the file."""
    requested = options.get("dtype") or options.get("torch_dtype") or "auto"
    dtype = config.dtype if requested == "auto" else requested
    if dtype is None or isinstance(dtype, dict):  # transformers' form for models of several parts
        return None
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or str(dtype).removeprefix("torch.") not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, or auto, got {shown(requested)}")
    return dtype


def _checked_headers(
    kind: str, config: ModelConfig, expected: dict[str, Tensor], names: Pieces, files: WeightFiles, mismatched: bool
) -> dict[str, TensorHeader]:
    """Return the headers of the model's weights in ``files``.

    Args:
        kind: layout of the files.
        config: of the model.
        expected: its weights without memory, by own name.
        names: their names in the files.
        files: headers of all tensors.
        mismatched: whether reward heads of other shapes count as missing.

    Raises UserError, which begins with the file, for missing, misshapen or unknown weights (reward heads apart).
    """
    named, headers = blocks_of(expected, names, config), dict(files.tensors)
    if kind in FAMILIES:
        remove_tables(files, headers, FAMILIES[kind].ignored)
        if config.tie_word_embeddings:
            (embedding,), (head,) = names[EMBEDDING], names_of(HEAD, FAMILIES[kind].weights)
            remove_copy(files, headers, embedding, head)
    for name, header in files.tensors.items() if mismatched else ():
        if _is_head(name) and name in named and tuple(header.shape) != tuple(named[name].shape):
            del headers[name]
    check_tensors(named, headers, files.path, optional=_is_head)
    unexpected = sorted(name for name in headers if name not in named)
    for name in unexpected if kind == checkpoint.RELEASED else ():
        try:
            checkpoint.own_name(name)
        except ValueError as error:  # a name that only begins as a head's
            raise UserError(f"{files.path}: {shown(str(error))}") from error
    if unexpected:
        log.warning(
            "%s: %d weights of reward heads that are not in the configuration are left out, the first is %s",
            files.path, len(unexpected), shown(unexpected[0]),
        )  # fmt: skip
    return {name: header for name, header in headers.items() if name in named}


def _check_host_memory(config: ModelConfig) -> None:
    """Raise UserError before memory is allocated if the weights of a new model do not fit on the host."""
    if nn.LayerNorm(1).weight.device.type != "cpu":  # of a context for another device, or one without memory
        return
    needed, available = config.least_parameters * torch.get_default_dtype().itemsize, host_memory()
    if needed > available:
        raise UserError(
            f"model: expected weights that fit into the {available / 1e9:.1f} GB of memory available here, got sizes "
            f"with at least {config.least_parameters:,} parameters, {needed / 1e9:.1f} GB"
        )


def _faulty_setting(config: ModelConfig, path: str | os.PathLike, error: Exception) -> UserError:
    """Return an error that names the setting, not of this model itself, without which a model can be made."""
    for name in sorted(vars(config).keys() - vars(ModelConfig()).keys()):
        others = copy.deepcopy(config)
        delattr(others, name)
        try:
            Model.expected_weights(others)
        except Exception:
            continue
        got = shown(getattr(config, name))
        return UserError(f"{path}/config.json: {name}: expected a setting that transformers can use, got {got}")
    got = shown(f"{type(error).__name__}: {error}")
    return UserError(f"{path}/config.json: expected settings that transformers can use, got {got}")
