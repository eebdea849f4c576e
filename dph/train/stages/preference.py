"""Alignment and head training: packed preference pairs."""

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dph.chat import Encoded
from dph.data.formats import Record
from dph.data.labels import EncodedAnswers, labels_of
from dph.data.packing import PackedBatch, PairBatches, fill, pack, packed_length
from dph.data.prefixes import Prefixes
from dph.data.sampler import Sampler, draw
from dph.errors import UserError
from dph.train.distributed import compute_dtype, full_tensor, partition_bins
from dph.train.precompute.pairs import PairCache, cache_directory
from dph.train.stages.base import LossSum, MicroBatch, Stage, StepBatch, excerpt
from dph.train.stages.held_out import HeldOutPairs, refusal_message
from dph.train.stages.labelled import AnswerLabels, answer_keys, answer_labels, label_totals, require_separable
from dph_kernels import preference_loss
from dph_kernels.preference_loss import metric_names
from dph_kernels.transfer import to_device

Pair = tuple[Encoded, Encoded] | EncodedAnswers  # chosen and rejected, or answers with labels


@dataclass(frozen=True)
class PairMicroBatch(MicroBatch):
    """Pairs of one micro-batch, in one or more bins; the pairs of a bin go through the backbone together.

    Attributes:
        pairs: encoded pairs, bin after bin.
        indices: positions of the pairs in the step's batch.
        bin_sizes: number of pairs in each bin.
        totals: of the labels of the step (``label_totals``); None if all of its records are plain pairs.
    """

    pairs: list[Pair]
    indices: list[int]
    bin_sizes: list[int]
    totals: tuple[Tensor, Tensor] | None = None

    length: ClassVar[Callable[[Pair], int]] = staticmethod(packed_length)  # of a pair, in tokens

    @property
    def rows(self) -> int:
        """Number of tokens of the largest bin."""
        sizes = [sum(map(self.length, bin_batch.pairs)) for bin_batch in self.bins()]
        return max(sizes)

    @property
    def finished(self) -> bool:
        """Whether every answer has a reward, since none was cut off."""
        return all(side.reward_position is not None for pair in self.pairs for side in pair)

    @cached_property
    def packed(self) -> PackedBatch:
        """Packed batch, its answers chosen and rejected in turn; not computed if all outputs come from a cache."""
        return pack(self.pairs)

    def bins(self) -> Iterator["PairMicroBatch"]:
        """Yield each bin as a micro-batch."""
        if len(self.bin_sizes) == 1:
            yield self
            return
        end = 0
        for size in self.bin_sizes:
            start, end = end, end + size
            yield type(self)(self.pairs[start:end], self.indices[start:end], [size], self.totals)

    def describe_nonfinite(self, values: Tensor, tokenizer: Any) -> str:
        """Return the index and the beginning of the first pair with a value that is not finite."""
        first = int((~torch.isfinite(values)).nonzero()[0])
        return f"pair {self.indices[first]} of the batch, {describe_pair(self.pairs[first], tokenizer)}"


class PairInputs(NamedTuple):
    """Inputs of the loss of N pairs, or of N records with A labelled answers, on the model's device.

    Attributes:
        answer_ids: [2N] or [A] int64 keys of the dropout masks, of pairs chosen and rejected in turn.
        frozen_outputs: of the frozen model (:class:`FrozenModel`), if the loss uses them.
        packed: tokens for the trained model; None in stage head, which trains only the heads.
        shown: [N, K] factors of the gradients of the rewards' K columns (:meth:`PreferenceStage.shown`); None without
            an ensemble.
        states: number of the first trained block and its input [T, C], if trained model and reference share them.
        labels: on the answers; None for plain pairs.
    """

    answer_ids: Tensor
    frozen_outputs: Tensor | None
    packed: PackedBatch | None
    shown: Tensor | None = None
    states: tuple[int, Tensor] | None = None
    labels: AnswerLabels | None = None


class FrozenModel:
    """Outputs of the model that a preference stage compares with or builds on, computed in the step or cached on disk.

    Stage align: log-probabilities [2N] fp32 of the reference model. Stage head: hidden states [2N, C] of the judged
    tokens from the frozen backbone.

    Attributes:
        kind: "reference" or "states".
        cached: whether the recipe keeps the outputs on disk.
    """

    def __init__(self, stage: "PreferenceStage") -> None:
        self.stage = weakref.proxy(stage)  # without a cycle, the models are freed with the stage
        recipe = stage.recipe
        self.kind = "states" if recipe.stage == "head" else "reference"
        if self.kind == "states":
            self.cached = recipe.data.cache_states
        else:
            self.cached = stage.needs_reference and recipe.objective.reference == "cache"

    @torch.no_grad()
    def __call__(
        self,
        micro_batch: PairMicroBatch,
        packed: PackedBatch | None = None,
        states: tuple[int, Tensor] | None = None,
    ) -> Tensor:
        """Return the outputs for all pairs.

        Args:
            micro_batch: the pairs.
            packed: the only bin on the model's device, if it is there already.
            states: of it, number and input of the first block that differs from the trained model's.
        """
        outputs, device = [], self.stage.model.device
        for bin_batch in micro_batch.bins():
            if not self.cached:
                outputs.append(self._compute(bin_batch, packed, states))
                continue
            cache = self.cache if micro_batch.totals is None else self.answer_cache
            outputs.append(cache.rows(bin_batch.pairs, lambda pairs=bin_batch: self._compute(pairs, packed)))
        joined = torch.cat(outputs)
        if not self.cached:
            return joined
        if self.kind == "reference":
            return to_device(joined.flatten(), device)
        answers = len(joined) if micro_batch.totals is not None else 2 * len(joined)
        return to_device(joined.view(answers, -1), device).to(self.stage.model.dtype)

    def _compute(
        self, micro_batch: PairMicroBatch, packed: PackedBatch | None, states: tuple[int, Tensor] | None = None
    ) -> Tensor:
        if packed is None:
            packed = micro_batch.packed.to(self.stage.model.device)
        if self.kind == "states":
            return self.stage.model.reward_states(packed)
        return self.stage.reference.forward_packed(packed, states=states).logprobs

    @cached_property
    def cache(self) -> PairCache:
        """Cache on disk, opened at the first use: by then the weights that name it have the precision of the run."""
        return self._open(2, self.kind)

    @cached_property
    def answer_cache(self) -> PairCache:
        """The same with a row for each answer, for steps that have records with other labels."""
        return self._open(1, f"answer-{self.kind}")

    @property
    def caches(self) -> list[PairCache]:
        """The caches that are open."""
        return [vars(self)[name] for name in ("cache", "answer_cache") if name in vars(self)]

    def _open(self, answers: int, kind: str) -> PairCache:
        """Open the cache of records of ``answers`` answers."""
        stage, config = self.stage, self.stage.model.config
        frozen, width = stage.reference, answers
        if self.kind == "states":
            layers = stage.model.heads.layers
            frozen, width = stage.model.backbone, answers * len(layers) * config.hidden_size
            if layers != [-1]:  # the name of the last layer's caches is that of earlier versions
                kind = "-".join([kind, *map(str, layers)])
        weights = {}
        for name, weight in frozen.named_parameters():
            if not name.startswith("heads."):
                if stage.world.world_size > 1:
                    weight = full_tensor(weight, compute_dtype(stage.model)).cpu()
                weights[name] = weight
        directory, any_rank = cache_directory(stage.recipe), stage.world.any_rank
        return PairCache(directory, kind, weights, config, stage.tokenizer, width, any_rank, by_answer=answers == 1)

    def flush(self) -> None:
        """Write the new outputs to the disk."""
        for cache in self.caches:
            cache.store.flush()

    def refresh(self) -> None:
        """Read the outputs that other ranks have written."""
        for cache in self.caches:
            cache.store.refresh()


class PreferenceStage(Stage):
    """Stages align and head: every step takes the next preference pairs, each with its prompt shared.

    Args:
        encode: from a record to a pair.
        records: training records.
        held_out: records for evaluation, by name.
        others: see :class:`Stage`.

    Attributes:
        rewarded: whether the loss has a reward term.
        column_heads: the head of each column of rewards in the loss.
        frozen: outputs of the reference model or the frozen backbone.
        batches: pairs of all ranks.

    Raises UserError for a missing head, an objective without any term, and a held-out source without a pair.
    """

    micro_batch_class: ClassVar[type[PairMicroBatch]] = PairMicroBatch

    def __init__(
        self,
        *,
        encode: Callable[[Record], Pair],
        records: Sampler,
        held_out: Mapping[str, Sequence[Record]],
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.encode = encode
        objective = self.recipe.objective
        self.rewarded = objective.dph_weight > 0
        self.needs_reference = self.recipe.stage == "align" and objective.dpo_weight > 0
        if not (self.rewarded or self.needs_reference):
            raise UserError("objective: expected a weight above 0 for a term that the stage trains, got none")
        heads = self.model.head_names
        missing = [name for name in objective.heads if name not in heads]
        if missing or not objective.heads:
            got = ", ".join(missing) or "none"
            raise UserError(f"objective.heads: expected at least one name, of {', '.join(heads)}, got {got}")
        self.members = {}  # of the heads to train
        for head in self.model.heads.values():
            self.members |= {name: head.members for name in head.reward if name in objective.heads}
        self.has_ensemble = self.rewarded and max(self.members.values()) > 1
        self.column_heads = [name for name in objective.heads for _ in range(self.members[name])]
        names = metric_names(self._columns() if self.rewarded else ())
        self._not_logged = names.index("finite")
        self.metrics = names[: self._not_logged] + names[self._not_logged + 1 :]
        self.frozen = FrozenModel(self)
        self.batches = self.open_pairs(records, self.recipe.batch.size)
        if self.recipe.data.prefixes:
            self.batches.cut = Prefixes(self.recipe.data.prefixes, self.recipe.seed)
        self.dropout_seed = draw(2**31, self.recipe.seed, "dropout")
        self.held_out = HeldOutPairs(self, held_out)

    def open_pairs(self, records: Sampler, size: int) -> PairBatches:
        """Return lists of ``size`` pairs of ``records``."""
        recipe = self.recipe
        return PairBatches(records, self.encode, size, recipe.data.context, recipe.batch.tokens, recipe.objective.heads)

    def first_pairs(self, count: int) -> list[Pair]:
        """Return the first ``count`` pairs of training; its position stays."""
        state, pairs = self.batches.state_dict(), []
        self.batches.load_state_dict(_from_the_beginning(state))
        try:
            while len(pairs) < count:
                pairs += next(self.batches)
        finally:
            self.batches.load_state_dict(state)
        return pairs[:count]

    def _columns(self) -> list[str]:
        """Return the names of the rewards in the loss: the heads, and of an ensemble HEAD_0, HEAD_1, ..."""
        columns = []
        for name in self.recipe.objective.heads:
            count = self.members[name]
            columns += [name] if count == 1 else [f"{name}_{member}" for member in range(count)]
        return columns

    def shown(self, pairs: Sequence[Pair]) -> Tensor:
        """Return the factors [N, K] of the gradients of each pair for each column: 2 or 0 for a member, else 1.

        With one pooler and the same pairs the members of an ensemble would become equal. So each learns from a random
        half of the pairs of its own, the same in every epoch, with twice the weight; the loss and its metrics are those
        of all pairs.
        """
        rows = []
        for pair in pairs:
            tokens = tuple(answer.tokens for answer in pair)
            bits, row = draw(2**62, self.recipe.seed, "ensemble", repr(tokens)), []
            for name in self.recipe.objective.heads:
                if self.members[name] == 1:
                    row.append(1.0)
                    continue
                for member in range(self.members[name]):
                    row.append(2.0 * draw(2, bits, name, member))
            rows.append(row)
        return torch.tensor(rows, device=self.model.device)

    def trains_by_stage(self, name: str) -> bool:
        """Return whether ``name`` is trained: the recipe's heads and poolers, and in stage align the backbone."""
        if not name.startswith("heads."):
            return self.recipe.stage == "align" and self.trains_backbone(name)
        heads, (_, group, kind, *rest) = self.recipe.objective.heads, name.split(".")
        if kind == "reward":
            return rest[0] in heads
        return kind != "standardise" and any(head in heads for head in self.model.heads[group].reward)

    def next_batch(self) -> StepBatch:
        """Return the next pairs, of which this rank's are divided into micro-batches."""
        first_record = self.batches.records.position
        pairs = next(self.batches)
        if self.rewarded:
            for pair in pairs:
                for answer in pair:
                    if answer.reward_position is None:
                        described = describe_pair(pair, self.tokenizer)
                        raise UserError(f"pairs: expected finished answers, got one that was cut off: {described}")
        if self.recipe.objective.dpo_mean:
            for pair in pairs:
                if not all(any(answer.loss_mask) for answer in pair):
                    described = describe_pair(pair, self.tokenizer)
                    raise UserError(f"pairs: expected answers with tokens to take the mean of, got none: {described}")
        lengths = list(map(self.micro_batch_class.length, pairs))
        return StepBatch(
            micro_batches=self.micro_batches(pairs, lengths, self.world.rank, self.world.world_size),
            weight=len(pairs),
            tokens=sum(lengths),
            records=f"records {first_record} to {self.batches.records.position - 1}",
            pairs=pairs,
            refused=self.batches.refused.total(),
        )

    def micro_batches(
        self, pairs: Sequence[Pair], lengths: Sequence[int], rank: int = 0, world_size: int = 1
    ) -> list[PairMicroBatch]:
        """Return the micro-batches of ``pairs`` that belong to a rank; ``lengths``: tokens of each pair.

        A micro-batch is a bin of ``batch.micro`` pairs, or of at most ``batch.tokens`` tokens. In stage head one
        micro-batch has all bins: the outputs of the frozen backbone are small, and have the same shape in every step.
        """
        if self.recipe.batch.tokens is not None:
            bins = fill(lengths, self.recipe.batch.tokens)
        else:
            order = list(range(len(pairs)))
            bins = []
            for start in range(0, len(pairs), self.micro_size):
                bins.append(order[start : start + self.micro_size])
        if world_size > 1:
            bins = partition_bins(bins, lengths, rank, world_size)
        groups = [bins] if self.recipe.stage == "head" else [[members] for members in bins]
        totals = None
        for pair in pairs:
            if isinstance(pair, EncodedAnswers):
                totals = self._label_totals(pairs)
                break
        micro_batches = []
        for group in groups:
            indices = list(itertools.chain.from_iterable(group))
            own_pairs = [pairs[index] for index in indices]
            micro_batches.append(self.micro_batch_class(own_pairs, indices, list(map(len, group)), totals))
        return micro_batches

    def _label_totals(self, records: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Return ``label_totals`` of a step; raise UserError if the recipe does not fit its labels."""
        for answers in records:
            if not all(label.is_pair for label in labels_of(answers)):
                require_separable(self.recipe, f"labelled alone, {describe_pair(answers, self.tokenizer)}")
        if self.recipe.cuda_graph:
            raise UserError("cuda_graph: expected false with labelled answers, whose number varies, got true")
        return label_totals(records, self.column_heads)

    def prepare(self, micro_batch: PairMicroBatch, step: int) -> PairInputs:
        """Return the inputs of the loss; dropout keys depend on the step and the pair, not on the micro-batch."""
        first_id, device, labels = 2 * self.recipe.batch.size * step, self.model.device, None
        ids: list[int] = []
        for index in micro_batch.indices:
            ids += (first_id + 2 * index, first_id + 2 * index + 1)
        if micro_batch.totals is not None:
            labels = answer_labels(micro_batch.pairs, self.column_heads, micro_batch.totals, device)
            ids = answer_keys(self.recipe.batch.size * step, micro_batch.indices, micro_batch.pairs)
        # Pinned, so that the copy does not wait for the GPU's earlier work.
        host_ids = torch.tensor(ids, dtype=torch.int64, pin_memory=device.type == "cuda")
        answer_ids = host_ids.to(device, non_blocking=True)
        shown = self.shown(micro_batch.pairs) if self.has_ensemble else None
        if self.recipe.stage == "head":
            return PairInputs(answer_ids, self.frozen(micro_batch), None, shown, None, labels)
        if not self.needs_reference:
            return PairInputs(answer_ids, None, without_targets(micro_batch.packed).to(device), shown, None, labels)
        packed, states = micro_batch.packed.to(device), None
        if self.frozen_blocks and self.shares_states:
            states = self.frozen_blocks, self._frozen_states(packed)
        return PairInputs(answer_ids, self.frozen(micro_batch, packed, states), packed, shown, states, labels)

    @property
    def shares_states(self) -> bool:
        """Whether the frozen blocks are computed once for trained model and reference.

        Not if a head judges one of them, nor on several ranks, whose shards are gathered for one model at a time.
        """
        computed = self.needs_reference and not self.frozen.cached and self.world.world_size == 1
        layers = self.model.heads.layers
        return computed and all(layer == -1 or layer >= self.frozen_blocks for layer in layers)

    @torch.no_grad()
    def _frozen_states(self, packed: PackedBatch) -> Tensor:
        """Return the input [T, C] of the first trained block."""
        return self.model.backbone(packed.tokens, packed.layout, blocks=self.frozen_blocks)

    def loss(self, inputs: PairInputs) -> LossSum:
        """Return the joint preference objective and its metrics."""
        dropout = {"dropout_seed": self.dropout_seed, "answer_ids": inputs.answer_ids}
        if inputs.packed is None:
            rewards = self.model.rewards_of(inputs.frozen_outputs, **dropout, each=True)
            logprobs = reference = None
        else:
            out = self.model.forward_packed(inputs.packed, **dropout, states=inputs.states)
            rewards, logprobs, reference = out.rewards | out.members, out.logprobs, inputs.frozen_outputs
        objective, labels, answers = self.recipe.objective, inputs.labels, len(inputs.answer_ids)
        groups: list[Tensor | None] = [None, logprobs, reference] if reference is not None else [None] * 3
        if objective.dpo_mean:
            counts = inputs.packed.trained.new_zeros(answers, dtype=logprobs.dtype)
            counts.index_add_(0, inputs.packed.answers, inputs.packed.trained.to(logprobs.dtype))
            groups[1:] = logprobs / counts, reference / counts  # the cache holds sums
        if self.rewarded:
            if inputs.shown is None:
                stacked = torch.stack([rewards[name] for name in objective.heads], 1)
            else:
                stacked = torch.cat([rewards[name].view(answers, -1) for name in objective.heads], 1)
                value = stacked.detach()
                shown = inputs.shown.repeat_interleave(2, 0) if labels is None else inputs.shown[labels.records]
                stacked = value + shown * (stacked - value)
            groups[0] = stacked
        sides, values = [], 0.0  # values: a number of each record
        for group in groups:
            if group is None:
                sides += None, None
            elif labels is None:
                sides += group[0::2], group[1::2]
                values = values + group.detach().reshape(answers // 2, -1).sum(1)
            else:
                sides += labels.sides(group)
                values = values + labels.sum_by_record(group.detach().reshape(answers, -1).sum(1))
        loss, metrics = preference_loss(
            *sides,
            beta=objective.beta,
            dpo_epsilon=objective.dpo_epsilon,
            dph_epsilon=objective.dph_epsilon,
            objective=objective.objective,
            dpo_weight=objective.dpo_weight,
            dph_weight=objective.dph_weight,
            labels=None if labels is None else labels.weights,
        )
        count = answers // 2 if labels is None else 1  # with labels, loss and metrics are sums already
        logged = torch.cat([metrics[: self._not_logged], metrics[self._not_logged + 1 :]])
        return LossSum(loss * count, logged * count, values)  # finite if all numbers of a pair are

    def left_out(self) -> str | None:
        """Return a message about the training pairs that were left out so far, or None."""
        return refusal_message(self.batches) if self.batches.refused else None

    def state(self, undo_batch: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the position in the data, and write new frozen outputs to the disk, since a checkpoint follows.

        Afterwards every rank sees the outputs of all ranks: in the next epoch a pair may belong to another rank.
        """
        with self.world.fail_together():
            self.frozen.flush()
        if self.world.world_size > 1:
            self.frozen.refresh()
        return {}, self.batches.undo() if undo_batch else self.batches.state_dict()

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from a position."""
        self.batches.load_state_dict(state)


def _from_the_beginning(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a stage's batches before the first one."""
    records = {**state["records"], "position": 0}
    if "sources" in records:
        records["sources"] = [{**source, "position": 0} for source in records["sources"]]
    return {**state, "records": records}


def describe_pair(pair: Pair, tokenizer: Any) -> str:
    """Return the beginning of the first answer's conversation, for messages."""
    return f"which begins {excerpt(tokenizer, pair[0].tokens)}"


def without_targets(packed: PackedBatch) -> PackedBatch:
    """Return the batch without targets, so that no log-probability is computed."""
    names = ("rows", "targets", "answers", "trained", "scored")
    return dataclasses.replace(packed, **{name: getattr(packed, name)[:0] for name in names})
