"""Metrics on held-out records: of each source, and over all of them together."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dph.chat import Encoded
from dph.data.formats import Record
from dph.data.sampler import InOrder
from dph.errors import UserError
from dph.evaluate.metrics import chosen_shares

if TYPE_CHECKING:
    from dph.train.stages.base import Stage

Sums = dict[str, tuple[float, int]]
"""Metric -> its sum over items, and their number."""

# Start of a reason for refusing a pair (``dph.data.packing.PairBatches``) -> key of the recipe for the limit.
LIMITS = {"longer than": "data.context", "more than": "batch.tokens"}


class HeldOut(ABC):
    """Evaluation of a stage's model on held-out records.

    Attributes:
        sources: records of each source, by name.
        metrics: names of the quantities measured on each source.
    """

    def __init__(self, sources: Mapping[str, Sequence[Record]], metrics: tuple[str, ...]) -> None:
        self.sources, self.metrics = sources, metrics

    def names(self) -> list[str]:
        """Return the keys of what :meth:`evaluate` returns."""
        return list(average({name: dict.fromkeys(self.metrics, (0.0, 1)) for name in self.sources}))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the means over all held-out items, and for several sources also ``METRIC/SOURCE``; {} without any."""
        return average({name: self.sums(name, records) for name, records in self.sources.items()})

    @abstractmethod
    def sums(self, name: str, records: Sequence[Record]) -> Sums:
        """Return the sum of each metric over the items of one source that have it, and their number."""

    def left_out(self) -> dict[str, str]:
        """Return messages, by source, about the records that the last evaluation left out."""
        return {}


class HeldOutStreams(HeldOut):
    """Loss, token accuracy and entropy of a language-model stage."""

    def __init__(self, stage: Stage, sources: Mapping[str, Sequence[Record]]) -> None:
        super().__init__(sources, stage.metrics)
        self.stage = weakref.proxy(stage)  # without a cycle, the model is freed with the stage

    def sums(self, name: str, records: Sequence[Record]) -> Sums:
        """Return the sums over the targets, and their number.

        There are as many streams as in training, so that the size of a micro-batch changes no result.
        """
        stage = self.stage
        streams = min(stage.recipe.batch.size, len(records))
        memories = stage.new_memories(streams)
        sums = torch.zeros(len(self.metrics), dtype=torch.float64, device=stage.model.device)
        count = 0
        for tokens, targets in stage.open_streams(InOrder(records), streams):
            for micro_batch in stage.micro_batches(memories, tokens, targets):
                stage.commit_others(memories, micro_batch.memory)
                loss = stage.loss(stage.prepare(micro_batch, 0))
                sums, count = sums + loss.sums, count + len(loss.values)
        return {metric: (total, count) for metric, total in zip(self.metrics, sums.tolist(), strict=True)}


class HeldOutPairs(HeldOut):
    """Accuracy of a preference stage: the chosen answer has the larger reward, or mean log-probability.

    A tie counts half. A pair with an empty answer, which has no mean log-probability, is left out of that accuracy.
    If the stage caches the states of a frozen backbone, the first evaluation computes the log-probability accuracy,
    which stays the same, and later evaluations read rewards from the cached states.

    Raises UserError for a source that gives no pair.
    """

    def __init__(self, stage: Stage, sources: Mapping[str, Sequence[Record]]) -> None:
        self.stage = weakref.proxy(stage)
        self.heads = stage.recipe.objective.heads if stage.rewarded else ()
        reward_metrics = ["reward_accuracy"] * len(self.heads)
        if len(self.heads) > 1:
            reward_metrics = [f"reward_accuracy_{head}" for head in self.heads]
        super().__init__(sources, (*reward_metrics, "logprob_accuracy"))
        self._frozen_logprobs: dict[str, tuple[float, int]] = {}  # sums by source, for a frozen backbone
        self._batches: dict[str, Any] = {}  # of the last evaluation, by source
        for name, records in sources.items():  # an error now rather than at the first evaluation
            batches = stage.open_pairs(InOrder(records), 1)
            if next(batches, None) is None:
                raise UserError(f"{name}: expected held-out pairs, got none: {refusal_message(batches)}")

    def sums(self, name: str, records: Sequence[Record]) -> Sums:
        """Return the number of correct pairs by each metric, and of the pairs that it compares.

        Raises RuntimeError if a reward or log-probability is not a finite number.
        """
        stage, all_finished = self.stage, True
        correct, compared = Counter(), Counter()
        frozen_logprobs = self._frozen_logprobs.get(name)
        self._batches[name] = stage.open_pairs(InOrder(records), stage.micro_size)
        for pairs in self._batches[name]:
            lengths = list(map(stage.micro_batch_class.length, pairs))
            for micro_batch in stage.micro_batches(pairs, lengths):
                scores = {}
                if frozen_logprobs is not None:
                    rewards = stage.model.rewards_of(stage.frozen(micro_batch))
                else:
                    out = stage.model.forward_packed(micro_batch.packed.to(stage.model.device))
                    rewards = out.rewards
                    scores["logprob_accuracy"] = out.mean_logprobs
                scores |= {metric: rewards[head] for metric, head in zip(self.metrics, self.heads, strict=False)}
                for metric, values in scores.items():
                    kept = _comparable(micro_batch.pairs, values, metric)
                    where = f"{name}: {metric}"
                    correct[metric] += float(chosen_shares(kept, lambda _, where=where: where)[:, :1].sum())
                    compared[metric] += len(kept)
                all_finished = all_finished and micro_batch.finished
        sums = {metric: (correct[metric], compared[metric]) for metric in self.metrics}
        if frozen_logprobs is not None:
            sums["logprob_accuracy"] = frozen_logprobs
        elif stage.frozen.kind == "states" and stage.frozen.cached and all_finished:
            self._frozen_logprobs[name] = sums["logprob_accuracy"]
        return sums

    def left_out(self) -> dict[str, str]:
        """Return messages, by source, about the records that the last evaluation left out."""
        messages = {}
        for name, batches in self._batches.items():
            if batches.refused:
                messages[f"records of {name}"] = refusal_message(batches, f"records of {name}")
        return messages


def _comparable(pairs: Sequence[Sequence[Encoded]], values: torch.Tensor, metric: str) -> list[list[float]]:
    """Return the values [2N] of the pairs both of whose answers have one.

    An empty answer has no mean log-probability, one that was cut off no reward.
    """
    kept = []
    for pair, pair_values in zip(pairs, values.view(-1, 2).tolist(), strict=True):
        if metric == "logprob_accuracy":
            has_values = all(any(answer.score_mask) for answer in pair)
        else:
            has_values = all(answer.reward_position is not None for answer in pair)
        if has_values:
            kept.append(pair_values)
    return kept


def refusal_message(batches: Any, name: str = "records") -> str:
    """Return how many records of ``PairBatches`` were left out, by reason, with the recipe's key for the limit."""
    reasons = []
    for reason, count in batches.refused.most_common():
        text = f"{count:,} {reason}"
        for start, key in LIMITS.items():
            if reason.startswith(start):
                text += f" ({key})"
        reasons.append(text)
    total, taken = batches.refused.total(), batches.records.position
    return f"{total:,} of {taken:,} {name} were left out: {', '.join(reasons)}"


def average(sources: Mapping[str, Sums]) -> dict[str, float]:
    """Return the means over all sources together and, if there are several, of each; NaN without any item."""
    totals: Counter[str] = Counter()
    items: Counter[str] = Counter()
    means: dict[str, float] = {}
    for name, sums in sources.items():
        for metric, (total, count) in sums.items():
            totals[metric] += total
            items[metric] += count
            means[f"{metric}/{name}"] = _mean(total, count)
    overall = {metric: _mean(totals[metric], items[metric]) for metric in totals}
    return overall | means if len(sources) > 1 else overall


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
