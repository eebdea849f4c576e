"""Judging, which all models share: reward heads on the hidden states of a backbone, and log-probabilities of answers.

:class:`dph.Model` brings a network of its own; ``dph.model.attached`` brings one of transformers.
"""

from __future__ import annotations

import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dph import chat
from dph.data.packing import PackedBatch, batches, pack
from dph.model.heads import JudgedStates, RewardHead, RewardHeads, split_members
from dph.model.padded_batch import PaddedBatch, checked_inputs, last_positions
from dph_kernels import checks, dispatch, linear_logprob

log = logging.getLogger(__name__)

SAMPLED = 4096
MAX_TOKENS = 16_384  # of a packed batch of answers to judge


class PackedOutput(NamedTuple):
    """Result of :meth:`JudgingModel.forward_packed` for A answers, with gradients.

    A tuple, because FSDP2 searches no other class of ours for gradients.

    Attributes:
        logprobs: [A] fp32 sum over ``loss_mask``.
        mean_logprobs: [A] fp32 mean over ``score_mask``; NaN for an answer without content.
        rewards: {head: [A]} fp32; NaN for an answer that was cut off, which has no token to judge.
        members: {head: [A, M]}, the rewards by each member of a head that is an ensemble; rewards has their means.
    """

    logprobs: Tensor
    mean_logprobs: Tensor
    rewards: dict[str, Tensor]
    members: dict[str, Tensor]


@dataclass(frozen=True)
class Judged:
    """Result of :meth:`JudgingModel.judge` for one group of alternatives, in plain numbers; see :class:`PackedOutput`.

    ``spreads`` has, by head that is an ensemble, the standard deviation over its members of each answer's rewards. The
    mean of an answer without content is None. The log-probabilities are None if they were not asked for.
    """

    logprobs: list[float] | None
    mean_logprobs: list[float | None] | None
    rewards: dict[str, list[float]]
    spreads: dict[str, list[float]] = field(default_factory=dict)


class JudgingModel(PreTrainedModel):
    """A language model with reward heads.

    Attributes:
        backbone: module from tokens [T] and their layout to states [T, C], as ``dph.model.backbone.Backbone``.
        output_proj, lm_head: from these to the states [.., E] that the language-model head multiplies, and the head.
        heads: the reward heads.
        untrained_heads: names of heads that a loaded checkpoint lacked.
        head_records: by head, what a file of it says about its training (``about`` of :meth:`save_head`).
    """

    backbone: Any
    output_proj: Any
    lm_head: nn.Module

    def _add_heads(self) -> None:
        """Add the reward heads of the configuration, with fresh weights."""
        self.heads = RewardHeads()
        self.untrained_heads: set[str] = set()
        self.head_records: dict[str, dict[str, Any]] = {}
        self._fresh: dict[str, Tensor] = {}  # samples of the weights that these heads began with, by name
        for key, names in self._head_groups():
            self.heads[key] = RewardHead(names, hidden_size=self.config.hidden_size, **self.config.head_form(key))

    def _head_groups(self) -> list[tuple[str, list[str]]]:
        """(key in ``heads``, names): the heads that share a pooler, and each task head."""
        shared = [("shared", self.config.reward_heads)] if self.config.reward_heads else []
        return shared + [(f"task_{name}", [name]) for name in self.config.task_heads]

    @property
    def head_names(self) -> list[str]:
        """Names of all reward heads."""
        return [*self.config.reward_heads, *self.config.task_heads]

    def set_reward_layer(self, layer: int | list[int], groups: Collection[str] | None = None) -> None:
        """Let untrained heads judge another layer or mix: all, or those of some keys of ``heads``."""
        config, groups = self.config, [key for key, _ in self.heads.items()] if groups is None else groups
        forms = {name: dict(config.head_form(f"task_{name}")) for name in config.task_heads}
        if "shared" in groups:
            config.reward_layer = layer
        for name, form in forms.items():
            form["layer"] = layer if f"task_{name}" in groups else form["layer"]
            if name in config.task_head_forms or form != config.head_form("shared"):
                config.task_head_forms[name] = form
        for head in (self.heads[key] for key in groups):
            like = next(head.reward.parameters())
            head.set_layer(layer)
            head.to(like.device, like.dtype)

    def check_heads(self, *names: str, training: bool = False) -> None:
        """Raise ValueError if a reward head is missing or, outside of training, has no trained weights."""
        if not self.head_names:
            raise ValueError(
                "rewards: expected a model with reward heads, got one without (config.reward_heads is empty)"
            )
        for name in names:
            if name not in self.head_names:
                raise ValueError(f"head: expected one of {', '.join(self.head_names)}, got {name!r}")
            if name in self.untrained_heads and not training:
                self._find_trained_heads()
            if name in self.untrained_heads and not training:
                raise ValueError(f"head {name!r}: the checkpoint holds no weights for it; train it before it judges")

    @abstractmethod
    def remade(self, config: Any) -> JudgingModel:
        """Return a model with the heads of another configuration; the caller loads this model's weights into it."""

    @abstractmethod
    def _hidden(
        self, inputs: Tensor, padded: PaddedBatch, *, observe: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Hidden states [T, C] of the tokens without padding; ``observe`` as in the backbone."""

    # Trained and untrained heads

    def _mark_loaded(self, names: Set[str], prefix: str = "") -> None:
        """Remove heads from ``untrained_heads`` all of whose weights are among ``names``."""
        for key, heads in self._head_groups() if isinstance(self.heads, RewardHeads) else ():
            head = f"{prefix}heads.{key}"
            if all(f"{head}.{name}" in names for name in self.heads[key].shared_weights()):
                self.untrained_heads -= {name for name in heads if f"{head}.reward.{name}.weight" in names}

    def _mark_untrained(self, missing: Set[str]) -> None:
        """Set ``untrained_heads`` to those with weights that a checkpoint lacked, and warn."""
        self.untrained_heads = set()
        for key, heads in self._head_groups():
            if not missing.isdisjoint(f"heads.{key}.{name}" for name in self.heads[key].shared_weights()):
                self.untrained_heads.update(heads)
            self.untrained_heads.update(head for head in heads if f"heads.{key}.reward.{head}.weight" in missing)
        if self.untrained_heads:
            self._fresh = self._samples()
            log.warning("no weights for reward heads %s: they start untrained", ", ".join(sorted(self.untrained_heads)))

    def _samples(self) -> dict[str, Tensor]:
        """Return up to SAMPLED elements of each weight of the reward heads, on the CPU, by name."""
        samples = {}
        for name, weight in self.heads.named_parameters():
            if not weight.is_meta and type(weight) in checks.PLAIN:  # no shards
                elements = weight.detach().flatten()
                samples[name] = elements[:: max(1, len(elements) // SAMPLED)].to("cpu", copy=True)
        return samples

    def _find_trained_heads(self) -> None:
        """Remove heads from ``untrained_heads`` whose weights are no longer those that they began with.

        Of several heads on one pooler those are trained whose own vector has changed.
        """
        if not self._fresh or not self.untrained_heads:
            return
        changed = set()
        for name, sample in self._samples().items():
            fresh = self._fresh.get(name)
            rounded = () if fresh is None else (fresh, fresh.bfloat16(), fresh.half())
            if not any(torch.equal(sample, values.to(sample.dtype)) for values in rounded):
                changed.add(name)
        for key, names in self._head_groups():
            pooler_changed = not changed.isdisjoint(f"{key}.{name}" for name in self.heads[key].shared_weights())
            for name in self.untrained_heads.intersection(names):
                if f"{key}.reward.{name}.weight" in changed or (pooler_changed and len(names) == 1):
                    self.untrained_heads.discard(name)

    def _trained_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Remove the vectors of untrained heads, and the poolers of groups without a trained head."""
        kept = dict(weights)
        self._find_trained_heads()
        if self.untrained_heads:
            names = ", ".join(sorted(self.untrained_heads))
            log.warning("reward heads %s were not trained since their weights were drawn: they are not saved", names)
        for key, names in self._head_groups():
            untrained = self.untrained_heads.intersection(names)
            for name in untrained:
                kept.pop(f"heads.{key}.reward.{name}.weight", None)
            for name in self.heads[key].shared_weights() if untrained == set(names) else ():
                kept.pop(f"heads.{key}.{name}", None)
        return kept

    # Packed answers

    def _logprobs(self, states: Tensor, targets: Tensor, *, statistics: bool = False, uniform: bool = True) -> Any:
        """Log-probabilities [R] fp32 of targets [R] after states [R, E]; arguments and results of ``linear_logprob``.

        A language-model head that was replaced, is observed by hooks, or has weights elsewhere computes its logits.
        """
        head = self.lm_head
        if not dispatch.is_modified(head, nn.Linear):
            return linear_logprob(states, head.weight, targets, statistics=statistics, uniform=uniform)
        logprobs = head(states).float().log_softmax(-1)
        chosen = logprobs.gather(-1, targets[:, None]).squeeze(-1)
        if not statistics:
            return chosen
        with torch.no_grad():
            return chosen, torch.special.entr(logprobs.exp()).sum(-1), logprobs.argmax(-1)

    def forward_packed(
        self,
        batch: PackedBatch,
        *,
        dropout_seed: int | None = None,
        answer_ids: Tensor | None = None,
        dropout: bool = True,
        states: tuple[int, Tensor] | None = None,
    ) -> PackedOutput:
        """Log-probabilities and rewards of all answers of a packed batch, each shared beginning computed once.

        Args:
            batch: result of :func:`dph.pack`, on the model's device.
            dropout_seed: seed of the reward heads' dropout in training; drawn from torch's generator if None.
            answer_ids: [A] int64 keys of the answers' dropout masks (their indices if None), so that micro-batches use
                the masks of the whole batch.
            dropout: False switches the reward heads' dropout off in training, too.
            states: the number of a block and its input [T, C], from an earlier call: no block below it is computed, and
                no head may judge one.
        """
        judged = self._judged_states(batch)
        hidden = self.backbone(batch.tokens, batch.layout, observe=judged, states=states)
        logprobs = self._logprobs(self.output_proj(hidden[batch.rows]), batch.targets, uniform=False)
        zeros = logprobs.new_zeros(len(batch.reward_rows))
        scored = batch.scored.to(logprobs.dtype)
        total = zeros.index_add(0, batch.answers, logprobs * batch.trained.to(logprobs.dtype))
        counts = zeros.index_add(0, batch.answers, scored)
        mean = zeros.index_add(0, batch.answers, logprobs * scored) / counts.clamp(min=1)
        mean = mean.masked_fill(counts == 0, float("nan"))  # after the division: 0/0 would put NaN in every gradient

        rewards, members = self._packed_rewards(judged.joined(), batch, dropout_seed, answer_ids, dropout)
        return PackedOutput(total, mean, rewards, members)

    def _judged_states(self, batch: PackedBatch, layers: list[int] | None = None) -> JudgedStates:
        """Return the observer of a pass over a packed batch; an answer that was cut off has another one's states."""
        rows = batch.reward_rows.clamp(min=0)  # of all answers: only the device knows how many were cut off
        layers = self.heads.layers if layers is None else layers
        return JudgedStates(layers, len(self.backbone.blocks), itemgetter(rows))

    def _packed_rewards(
        self,
        states: Tensor,
        batch: PackedBatch,
        dropout_seed: int | None = None,
        answer_ids: Tensor | None = None,
        dropout: bool = False,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rewards and members as in :class:`PackedOutput` of states as :meth:`reward_states` returns them.

        The other arguments as in :meth:`forward_packed`.
        """
        cut_off = batch.reward_rows < 0
        if answer_ids is None:
            answer_ids = torch.arange(len(cut_off), device=cut_off.device)
        rewards, members = split_members(self.heads(states, dropout_seed, answer_ids, dropout, each=True))
        for name in rewards:
            rewards[name] = rewards[name].masked_fill(cut_off, float("nan"))
        for name in members:
            members[name] = members[name].masked_fill(cut_off[:, None], float("nan"))
        return rewards, members

    def reward_states(self, batch: PackedBatch, layers: list[int] | None = None) -> Tensor:
        """Hidden states [A, N C] of the judged tokens of the A answers of a packed batch; of no use if one was cut off.

        Those of N ``layers`` side by side, by default those that the heads judge (``heads.layers``); no later block is
        computed.
        """
        judged = self._judged_states(batch, layers)
        self.backbone(batch.tokens, batch.layout, observe=judged, blocks=judged.blocks)
        return judged.joined()

    def rewards_of(
        self,
        states: Tensor,
        *,
        dropout_seed: int | None = None,
        answer_ids: Tensor | None = None,
        dropout: bool = True,
        each: bool = False,
    ) -> dict[str, Tensor]:
        """Rewards {head: [A]} fp32 of hidden states [A, N C], as :meth:`reward_states` returns them.

        ``dropout_seed``, ``answer_ids`` and ``dropout`` as in :meth:`forward_packed`; with ``each`` the rewards [A, M]
        by each member of a head that is an ensemble.
        """
        return self.heads(states, dropout_seed, answer_ids, dropout, each)

    # Judging

    def rewards(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        reward_positions: Tensor | Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Rewards {head: [B]} fp32 of conversations [B, S].

        Without ``reward_positions`` [B] the last token that is not padding is judged, which must be the end-of-turn
        token.

        Raises ValueError for a model without heads, for heads whose weights were never loaded or trained (in evaluation
        mode), and if the judged token is not the end-of-turn token and no position was given.
        """
        self.check_heads(*self.head_names, training=self.training)
        padded = PaddedBatch.from_inputs(checked_inputs(self.backbone.embedding.weight, input_ids), attention_mask)
        if reward_positions is None:
            reward_positions = last_positions(input_ids, padded.mask, self.config.im_end_token_id)
        positions = padded.token_columns("reward_positions", reward_positions)
        judged = JudgedStates(self.heads.layers, len(self.backbone.blocks), partial(padded.select, columns=positions))
        self._hidden(input_ids, padded, observe=judged)
        return self.rewards_of(judged.joined())

    def judge(
        self, groups: Iterable[Sequence[chat.Encoded]], max_tokens: int = MAX_TOKENS, *, logprobs: bool = True
    ) -> list[Judged]:
        """Log-probabilities and rewards of groups of alternatives, each group's shared beginning computed once.

        Arguments as :meth:`judge_batches`.
        """
        return list(itertools.chain.from_iterable(self.judge_batches(groups, max_tokens, logprobs=logprobs)))

    @torch.no_grad()
    def judge_batches(
        self, groups: Iterable[Sequence[chat.Encoded]], max_tokens: int = MAX_TOKENS, *, logprobs: bool = True
    ) -> Iterator[list[Judged]]:
        """Yield the results of :meth:`judge` for one packed batch of groups after another.

        Args:
            groups: alternatives of one prompt each (``dph.chat.encode``).
            max_tokens: upper bound on the tokens of a packed batch before sharing; a larger group is computed alone.
            logprobs: False leaves out what only log-probabilities need: the language-model head, and all blocks above
                the layers that the heads judge.

        The reward heads' dropout is off in training, too, and the mode does not change, so that another thread may
        train the model. Modules of other libraries inside of the model (LoRA with dropout) follow ``training``.
        """
        for batch in batches(groups, max_tokens):
            packed = pack(batch).to(self.device)
            if logprobs:
                out = self.forward_packed(packed, dropout=False)
                sums, means = out.logprobs.tolist(), out.mean_logprobs.tolist()
                for i, answer in enumerate(itertools.chain.from_iterable(batch)):
                    means[i] = means[i] if any(answer.score_mask) else None
                rewards, members = out.rewards, out.members
            else:
                sums = means = None
                rewards, members = self._packed_rewards(self.reward_states(packed), packed)
            rewards = {name: values.tolist() for name, values in rewards.items()}
            spreads = {name: values.std(1).tolist() for name, values in members.items()}
            judged, end = [], 0
            for group in batch:
                own = slice(end, end + len(group))
                end += len(group)
                own_rewards = {name: values[own] for name, values in rewards.items()}
                own_spreads = {name: values[own] for name, values in spreads.items()}
                own_logprobs = (sums[own], means[own]) if logprobs else (None, None)
                judged.append(Judged(*own_logprobs, own_rewards, own_spreads))
            yield judged

    def score(
        self, tokenizer: Any, conversations: Sequence[Any], head: str = "default", max_tokens: int = MAX_TOKENS
    ) -> Tensor:
        """Rewards [len(conversations)] fp32 of conversations, each a list of messages that ends with an answer.

        Consecutive conversations that differ in the last message alone have their beginning computed once. Dropout and
        mode as in :meth:`judge`; ``max_tokens`` bounds a packed batch. Raises ValueError as :meth:`rewards` in
        evaluation mode, and for a conversation that does not end in an assistant turn.
        """
        self.check_heads(head)
        groups: list[list[chat.Encoded]] = []
        beginning, room = None, 0
        for i, conversation in enumerate(conversations):
            encoded = chat.encode(conversation, tokenizer)
            chat.check_final_answer(conversation, f"conversations[{i}]")
            if beginning != conversation[:-1] or len(encoded) > room:
                groups.append([])
                beginning, room = conversation[:-1], max_tokens
            groups[-1].append(encoded)
            room -= len(encoded)
        judged = self.judge(groups, max_tokens, logprobs=False)
        return torch.tensor([reward for group in judged for reward in group.rewards[head]])
