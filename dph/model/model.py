"""The language model that judges its own answers: backbone, tied language-model head, reward heads.

| part | shape | weights |
|---|---|---|
| embedding, up-projection, norm | [V, E], E -> C | ``backbone.embedding``, ``input_proj``, ``input_norm`` |
| blocks | x + attention(norm(x)), x + ffn(norm(x)) | ``backbone.blocks`` |
| norm, down-projection, tied head | C -> E, times the transposed embedding | ``output_norm``, ``output_proj`` |
| reward heads | C -> 1 | ``heads`` |
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from dph import chat, checkpoint
from dph.data.packing import PackedBatch, batches, pack
from dph.losses import IGNORED
from dph.model.backbone import Backbone
from dph.model.config import ModelConfig, hub_arguments, with_config
from dph.model.heads import RewardHead
from dph.model.memory import Memory
from dph.model.padded_batch import Dense, check_labels, check_tokens, chosen_inputs, last_positions
from dph_kernels import PackedLayout, checks, linear_logprob
from dph_kernels.transfer import to_device

log = logging.getLogger(__name__)


class PackedOutput(NamedTuple):
    """What :meth:`Model.forward_packed` gives for A answers, with gradients.

    A tuple, since FSDP2 looks for gradients in no other class of ours.

    Attributes:
        logprobs: [A] fp32 sum over ``loss_mask``.
        mean_logprobs: [A] fp32 mean over ``score_mask``; NaN for an answer without content.
        rewards: {head: [A]} fp32; NaN where the answer was cut off and so has no token to judge.
    """

    logprobs: Tensor
    mean_logprobs: Tensor
    rewards: dict[str, Tensor]


@dataclass(frozen=True)
class Judged:
    """What :meth:`Model.judge` says of one group of alternatives, in plain numbers; see :class:`PackedOutput`."""

    logprobs: list[float]
    mean_logprobs: list[float]
    rewards: dict[str, list[float]]


class Model(PreTrainedModel, GenerationMixin):
    """Direct Preference Heads model (arXiv 2405.20053): a causal language model with reward heads.

    ``Model(ModelConfig(...))`` is fresh; ``Model.from_pretrained(path)`` reads the own format or a released
    ``lsw_transformer`` directory; ``AutoModelForCausalLM`` and ``generate`` work.

    Inside, the tokens of a batch lie end to end without padding: hooks on its modules see rows [T, C], not [B, S, C].
    """

    config_class = ModelConfig
    config: ModelConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # so that transformers' Trainer passes num_items_in_batch
    _no_split_modules = ("Block",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.backbone = Backbone(config)
        self.output_proj = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        self.heads = nn.ModuleDict()
        self.untrained_heads: set[str] = set()  # heads that a loaded checkpoint did not hold
        for key, names in self._head_groups():
            self.heads[key] = self._make_head(names)
        self.post_init()
        self.loss_type = (
            "ForCausalLM"  # transformers' Trainer counts labels by it; it would guess from the class's name
        )
        own = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        ends = [token for token in dict.fromkeys([*own, config.im_end_token_id]) if token is not None]
        self.generation_config.eos_token_id = ends or None  # plain ``generate`` stops where an answer ends, too

    def _head_groups(self) -> list[tuple[str, list[str]]]:
        shared = [("shared", self.config.reward_heads)] if self.config.reward_heads else []
        return shared + [(f"task_{name}", [name]) for name in self.config.task_heads]

    def _make_head(self, names: list[str]) -> RewardHead:
        c = self.config
        return RewardHead(names, c.reward_pooler, c.hidden_size, c.intermediate_size, c.reward_dropout)

    @property
    def head_names(self) -> list[str]:
        """Names of all reward heads."""
        return [*self.config.reward_heads, *self.config.task_heads]

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding, which is also the language-model head."""
        return self.backbone.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the token embedding, and with it the language-model head."""
        self.backbone.embedding = value

    # Loading

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *args: Any, **kwargs: Any) -> "Model":
        """Load the own format or a released ``lsw_transformer`` model, from disk or hub; safetensors only.

        Keyword arguments named as fields of :class:`ModelConfig` override the configuration. A reward head that the
        checkpoint lacks starts afresh: a warning says so, and it raises when it is asked to score.
        """
        loading_info = kwargs.pop("output_loading_info", False)
        hub = hub_arguments(kwargs)
        name, fields = str(path), PretrainedConfig.get_config_dict(path, **hub)[0]
        if fields.get("model_type") == checkpoint.RELEASED:
            kwargs = with_config(path, kwargs)
            kwargs["state_dict"] = checkpoint.from_official(load_file(cached_file(path, "model.safetensors", **hub)))
            path = None
        kwargs.setdefault("use_safetensors", True)
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model.name_or_path = model.config.name_or_path = name
        model.untrained_heads = set(model._heads_without_weights(info["missing_keys"]))
        if model.untrained_heads:
            log.warning(
                "no weights for reward heads %s: they start untrained", ", ".join(sorted(model.untrained_heads))
            )
        return (model, info) if loading_info else model

    def _heads_without_weights(self, missing: set[str]) -> Iterator[str]:
        """Names of the heads whose vector or pooler is among the ``missing`` weights."""
        for key, names in self._head_groups():
            no_pooler = any(weight.startswith(f"heads.{key}.pooler.") for weight in missing)
            yield from (name for name in names if no_pooler or f"heads.{key}.reward.{name}.weight" in missing)

    def save_pretrained(self, directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Save as transformers does, but for ``untrained_heads``, which are to load as untrained again."""
        weights = self._without_untrained_heads(kwargs.pop("state_dict", None) or self.state_dict())
        return super().save_pretrained(directory, *args, state_dict=weights, **kwargs)

    def _without_untrained_heads(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        left_out = set(self._weights_of_untrained_heads())
        return {name: tensor for name, tensor in weights.items() if name not in left_out}

    def _weights_of_untrained_heads(self) -> Iterator[str]:
        """Names of the reward vectors, and of poolers that serve no trained one."""
        for key, names in self._head_groups():
            untrained = self.untrained_heads.intersection(names)
            yield from (f"heads.{key}.reward.{name}.weight" for name in untrained)
            if untrained == set(names):
                yield from (f"heads.{key}.pooler.{name}" for name, _ in self.heads[key].pooler.named_parameters())

    def save_official(self, directory: str | os.PathLike) -> None:
        """Write a released-layout (``lsw_transformer``) directory: config.json and model.safetensors.

        Heads that were never trained are left out, as by :meth:`save_pretrained`. Raises ValueError, before anything is
        written, for what that layout cannot hold: task heads, another epsilon.
        """
        from safetensors.torch import save_file

        config = checkpoint.config_to_official(self.config)
        tensors = checkpoint.to_official(self._without_untrained_heads(self.state_dict()))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        os.makedirs(directory, exist_ok=True)
        save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
        with open(os.path.join(directory, "config.json"), "w") as file:
            json.dump(config, file, indent=2)

    # Dense batches

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
        cache_position: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            input_ids: [B, S] int64.
            attention_mask: [B, S'] with S' >= S, 0 for padding (on either side); columns before the last S speak of
                what the memory has seen. Padding is neither computed nor remembered; its logits are zero.
            labels: [B, S] int64, aligned with the tokens and shifted here; -100 is ignored.
            past_key_values: a :class:`dph.Memory`, read and updated, detached.
            use_cache: True without a memory makes one that keeps all.
            logits_to_keep: last columns to compute logits for; 0 for all, or the columns' indices.
            num_items_in_batch: divisor of the summed loss, for gradient accumulation; the labels' number if None.
            position_ids: [B, S], where a row holds several documents: positions begin anew at 0 with each, and no token
                sees another document. Beside a memory, whose rows go on, a row is one document.
            return_dict: False gives a tuple; None leaves it to the configuration, as of ``output_hidden_states``.
            cache_position, token_type_ids: taken since other libraries pass them; they change nothing.
            output_attentions: taken likewise, but True is not supported.
            output_hidden_states: also give ``hidden_states``, each block's input and the result. They have gradients,
                but the loss has none for them: the blocks read rows, not these.
            inputs_embeds: [B, S, E] what :meth:`get_input_embeddings` gives for the tokens, in place of ``input_ids``.

        Returns:
            ``logits`` [B, S, V], ``loss`` (mean over labels), ``past_key_values``, ``hidden_states`` (L + 1 of
            [B, S, C], zeros in the padding).

        Raises ValueError where shapes do not fit, a token is not in the vocabulary (on the CPU), or the cache is not a
        :class:`dph.Memory`.
        """
        embedding = self.backbone.embedding.weight
        inputs = chosen_inputs(embedding, input_ids, inputs_embeds)
        if labels is not None:
            check_labels(labels, inputs, len(embedding))
        if output_attentions:
            raise ValueError("output_attentions: expected False, got True: no kernel of ours forms them")
        if past_key_values is not None and not isinstance(past_key_values, Memory):
            raise ValueError(f"past_key_values: expected dph.Memory, got {type(past_key_values).__name__}")
        if past_key_values is None and use_cache:
            past_key_values = Memory(length=max(4096, inputs.shape[1]))
        dense = Dense.of(inputs, attention_mask, position_ids if inputs.shape[1] > 1 else None)
        if past_key_values is not None:
            dense.check_one_document()
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = [] if wanted else None
        grid = dense.spread(self.output_proj(self._hidden(inputs, dense, past_key_values, states)))
        loss = None if labels is None else self._loss(grid, labels, num_items_in_batch)
        columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # -0: all
        logits = F.linear(grid[:, columns], embedding)
        states = None if states is None else tuple(map(dense.spread, states))
        output = CausalLMOutputWithPast(loss, logits, past_key_values=past_key_values, hidden_states=states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _hidden(
        self, inputs: Tensor, dense: Dense, memory: Memory | None = None, states: list[Tensor] | None = None
    ) -> Tensor:
        """Hidden states [T, C] of the tokens that are no padding, row by row; ``states`` as the backbone has it."""
        rows = dense.rows(inputs)
        if memory is None:
            return self.backbone(rows, PackedLayout.documents(dense.documents).to(rows.device), states=states)
        layers = len(self.backbone.blocks)
        if memory.columns and len(memory) != layers:
            raise ValueError(f"past_key_values: expected a memory of {layers} layers, got one of {len(memory)}")
        layout = memory.begin(dense.counts).to(rows.device)
        hidden = self.backbone(rows, layout, memory, dense.counts, states)
        memory.end(dense.counts, dense.shape[1])
        return hidden

    def _loss(self, grid: Tensor, labels: Tensor, divisor: int | Tensor | None) -> Tensor:
        """Cross-entropy of shifted labels without logits; NaN without a label, as a mean over nothing."""
        targets = labels[:, 1:]
        wanted = targets != IGNORED
        logprobs = linear_logprob(grid[:, :-1][wanted], self.backbone.embedding.weight, targets[wanted])
        return -logprobs.sum() / (wanted.sum() if divisor is None else divisor)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Plain ``generate()`` gets a memory that forgets nothing; one that the user passes branches as its rows do."""
        memory = model_kwargs.get("past_key_values")
        if isinstance(memory, Memory):
            memory._is_user_defined = True  # transformers' mark for a cache that outlives the call
            memory.batch_repeat_interleave(max(generation_config.num_beams, generation_config.num_return_sequences))
        elif memory is None and generation_config.use_cache is not False:
            given = model_kwargs.get("inputs_embeds")  # transformers' length may not count them
            length = generation_config.max_length + (0 if given is None else given.shape[1])
            model_kwargs["past_key_values"] = Memory(length=length)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers' own, but a memory that has seen all of ``input_ids`` is an error, not a wrong slice."""
        if next_sequence_length is not None and next_sequence_length < 1:
            name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
            raise ValueError(
                f"{name}: expected the {given.shape[1] - next_sequence_length} tokens that the memory has seen and at "
                f"least one more (or new tokens alone, with an attention_mask over all), got {given.shape[1]}"
            )
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    # Streams and packed answers

    def stream_logprobs(
        self, tokens: Tensor, targets: Tensor, memory: Memory | None = None, *, statistics: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the targets of B streams, without logits.

        Args:
            tokens: [B, S] int64.
            targets: [B, S] int64, shifted already; -100 is ignored. On the CPU, so that the host need not wait for the
                model's device, or there.
            memory: read and updated, detached.
            statistics: also say how sure the model was, and whether it was right.

        Returns:
            [R] fp32, the targets that are not -100, row by row. With ``statistics``: (log-probabilities, entropy [R] in
            nats, whether the most probable token was the target [R] bool), the last two without gradient.
        """
        checks.shape("tokens", tokens, "B", "S")
        check_tokens("tokens", tokens, len(self.backbone.embedding.weight))
        hidden, targets = self._hidden(tokens, Dense.of(tokens), memory), targets.flatten()
        rows = (targets != IGNORED).nonzero().flatten()
        states, targets = self.output_proj(hidden[to_device(rows, self.device)]), to_device(targets[rows], self.device)
        found = linear_logprob(states, self.backbone.embedding.weight, targets, statistics=statistics)
        return (*found[:2], found[2] == targets) if statistics else found

    def forward_packed(
        self, batch: PackedBatch, *, dropout_seed: int | None = None, answer_ids: Tensor | None = None
    ) -> PackedOutput:
        """Log-probabilities and rewards of all answers of a packed batch, each shared beginning computed once.

        Args:
            batch: what :func:`dph.pack` gives, on the model's device.
            dropout_seed: of the reward heads' dropout in training; drawn from torch's generator if None.
            answer_ids: [A] int64 keys of the answers' dropout masks (their numbers if None), so that a batch that is
                split for gradient accumulation keeps its masks.
        """
        hidden = self.backbone(batch.tokens, batch.layout)
        answers = len(batch.reward_rows)
        states, weight = self.output_proj(hidden[batch.rows]), self.backbone.embedding.weight
        logprobs = linear_logprob(states, weight, batch.targets, uniform=False)
        zeros = logprobs.new_zeros(answers)
        trained = batch.trained.to(logprobs.dtype)
        scored = batch.scored.to(logprobs.dtype)
        total = zeros.index_add(0, batch.answers, logprobs * trained)
        counts = zeros.index_add(0, batch.answers, scored)
        mean = zeros.index_add(0, batch.answers, logprobs * scored) / counts.clamp(min=1)
        mean = mean.masked_fill(counts == 0, float("nan"))  # after the division: 0/0 would put NaN in every gradient
        return PackedOutput(total, mean, self._packed_rewards(hidden, batch, dropout_seed, answer_ids))

    def reward_states(self, batch: PackedBatch) -> Tensor:
        """Hidden states [A, C] of the judged tokens of a packed batch, each of whose A answers is finished."""
        return self.backbone(batch.tokens, batch.layout)[batch.reward_rows]

    def rewards_of(
        self, states: Tensor, *, dropout_seed: int | None = None, answer_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Rewards {head: [A]} fp32 of what :meth:`reward_states` gave, with :meth:`forward_packed`'s dropout."""
        return self._reward(states, dropout_seed, answer_ids)

    def _packed_rewards(
        self, hidden: Tensor, batch: PackedBatch, seed: int | None, ids: Tensor | None
    ) -> dict[str, Tensor]:
        cut_off = batch.reward_rows < 0  # judged all the same: how many they are only the device knows
        ids = torch.arange(len(cut_off), device=hidden.device) if ids is None else ids
        rewards = self._reward(hidden[batch.reward_rows.clamp(min=0)], seed, ids)
        return {name: r.masked_fill(cut_off, float("nan")) for name, r in rewards.items()}

    def _reward(self, states: Tensor, seed: int | None = None, row_ids: Tensor | None = None) -> dict[str, Tensor]:
        """Rewards {head: [R]} of hidden states [R, C]."""
        rewards: dict[str, Tensor] = {}
        for head in self.heads.values():
            rewards |= head(states, seed, row_ids)
        return rewards

    # Judging

    def rewards(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        reward_positions: Tensor | Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Rewards {head: [B]} fp32 of conversations [B, S].

        Without ``reward_positions`` [B] the last token that is not padding is judged, which must be ``<|im_end|>``.

        Raises ValueError for a model without heads, for heads whose weights were never loaded or trained (in evaluation
        mode), and where the judged token is not ``<|im_end|>`` and no position was given.
        """
        self.check_heads(*self.head_names, training=self.training)
        dense = Dense.of(chosen_inputs(self.backbone.embedding.weight, input_ids), attention_mask)
        if reward_positions is None:
            reward_positions = last_positions(input_ids, dense.mask, self.config.im_end_token_id)
        positions = dense.token_columns("reward_positions", reward_positions)
        grid = dense.spread(self._hidden(input_ids, dense))
        return self._reward(grid[torch.arange(len(grid), device=grid.device), positions])

    def check_heads(self, *names: str, training: bool = False) -> None:
        """Raise ValueError where a reward head is missing, or, outside of training, has no weights to judge by."""
        if not self.head_names:
            raise ValueError(
                "rewards: expected a model with reward heads, got one without (config.reward_heads is empty)"
            )
        for name in names:
            if name not in self.head_names:
                raise ValueError(f"head: expected one of {', '.join(self.head_names)}, got {name!r}")
            if name in self.untrained_heads and not training:
                raise ValueError(f"head {name!r}: the checkpoint holds no weights for it; train it before it judges")

    @torch.no_grad()
    def judge(self, groups: Iterable[Sequence[chat.Encoded]], max_tokens: int = 16_384) -> list[Judged]:
        """Log-probabilities and rewards of groups of alternatives, each group's shared beginning computed once.

        Args:
            groups: alternatives of one prompt each (``dph.chat.encode``).
            max_tokens: bound on the tokens of a packed batch before sharing; a larger group goes alone.

        Dropout is off; the model's mode is left as it was.
        """
        was_training = self.training
        self.eval()
        try:
            return [judged for batch in batches(groups, max_tokens) for judged in self._judge(batch)]
        finally:
            self.train(was_training)

    def _judge(self, groups: list[Sequence[chat.Encoded]]) -> Iterator[Judged]:
        out = self.forward_packed(pack(groups).to(self.device))
        columns = {"logprobs": out.logprobs, "mean_logprobs": out.mean_logprobs, **out.rewards}
        values = {name: tensor.tolist() for name, tensor in columns.items()}
        start = 0
        for group in groups:
            part = {name: column[start : start + len(group)] for name, column in values.items()}
            start += len(group)
            yield Judged(part.pop("logprobs"), part.pop("mean_logprobs"), part)

    def score(
        self, tokenizer: Any, conversations: Sequence[Any], head: str = "default", max_tokens: int = 16_384
    ) -> Tensor:
        """Rewards [len(conversations)] fp32 of conversations, each a list of messages that ends with an answer.

        Raises ValueError as :meth:`rewards`, and for a conversation without an assistant turn. ``max_tokens`` bounds a
        packed batch.
        """
        self.check_heads(head)
        groups = [[chat.encode(conversation, tokenizer)] for conversation in conversations]
        return torch.tensor([judged.rewards[head][0] for judged in self.judge(groups, max_tokens)])
