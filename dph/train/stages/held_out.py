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
from dph.data.labels import labels_of
from dph.data.sampler import InOrder
from dph.errors import UserError
from dph.evaluate.metrics import chosen_shares

if TYPE_CHECKING:
    from dph.train.stages.base import Stage

Sums = dict[str, tuple[float, float]]
"""Metric -> its sum over items, and their number; of labels both by weight, 1 for a pair."""

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
        """Return the sums over the targets of all documents, each computed alone, and the number of targets."""
        stage = self.stage
        sums = torch.zeros(len(self.metrics), dtype=torch.float64, device=stage.model.device)
        count = 0
        for micro_batch in stage.document_segments(records):
            loss = stage.loss(stage.prepare(micro_batch, 0))
            sums, count = sums + loss.sums, count + len(loss.values)
        return {metric: (total, count) for metric, total in zip(self.metrics, sums.tolist(), strict=True)}


class HeldOutPairs(HeldOut):
    """Accuracy of a preference stage: the chosen answer has the larger reward, or mean log-probability.

    A tie counts half. A pair with an empty answer, which has no mean log-probability, is left out of that accuracy. The
    reward of an answer that is labelled alone has to be above 0 if it is good, below 0 if it is bad. If the stage
    caches the states of a frozen backbone, the first evaluation computes the log-probability accuracy, which stays the
    same, and later evaluations read rewards from the cached states.

    Raises UserError for a source that gives no pair.
    """

    def __init__(self, stage: Stage, sources: Mapping[str, Sequence[Record]]) -> None:
        self.stage = weakref.proxy(stage)
        self.heads = stage.recipe.objective.heads if stage.rewarded else ()
        reward_metrics = ["reward_accuracy"] * len(self.heads)
        if len(self.heads) > 1:
            reward_metrics = [f"reward_accuracy_{head}" for head in self.heads]
        super().__init__(sources, (*reward_metrics, "logprob_accuracy"))
        self._frozen_logprobs: dict[str, tuple[float, float]] = {}  # sums by source, for a frozen backbone
        self._batches: dict[str, Any] = {}  # of the last evaluation, by source
        for name, records in sources.items():  # an error now rather than at the first evaluation
            batches = stage.open_pairs(InOrder(records), 1)
            if next(batches, None) is None:
                raise UserError(f"{name}: expected held-out pairs, got none: {refusal_message(batches)}")

    def sums(self, name: str, records: Sequence[Record]) -> Sums:
        """Return the weight of the correct labels by each metric, and of the labels that it compares.

        Raises RuntimeError if a reward or log-probability is not a finite number.
        """
        stage, all_finished = self.stage, True
        correct, compared = Counter(), Counter()
        frozen_logprobs = self._frozen_logprobs.get(name)
        self._batches[name] = stage.open_pairs(InOrder(records), stage.micro_size)
        for pairs in self._batches[name]:
            lengths = list(map(stage.micro_batch_class.length, pairs))
            for micro_batch in stage.micro_batches(pairs, lengths):
                scores: dict[str, tuple[str | None, Any]] = {}  # metric -> head, and values of the answers
                if frozen_logprobs is not None:
                    rewards = stage.model.rewards_of(stage.frozen(micro_batch))
                else:
                    out = stage.model.forward_packed(micro_batch.packed.to(stage.model.device))
                    rewards = out.rewards
                    scores["logprob_accuracy"] = None, out.mean_logprobs
                for metric, head in zip(self.metrics, self.heads, strict=False):
                    scores[metric] = head, rewards[head]
                for metric, (head, values) in scores.items():
                    sides, weights = compared_sides(micro_batch.pairs, values.tolist(), head)
                    where = f"{name}: {metric}"
                    shares = chosen_shares(sides, lambda _, where=where: where)
                    correct[metric] += sum(
                        float(share[0]) * weight for share, weight in zip(shares, weights, strict=True)
                    )
                    compared[metric] += sum(weights)
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


def compared_sides(
    records: Sequence[Sequence[Encoded]], values: Sequence[float], head: str | None
) -> tuple[list[list[float]], list[float]]:
    """Return the values of the better and the worse answer of each label both of whose answers have one, and weights.

    Args:
        records: answers, end to end those of ``values``.
        values: mean log-probabilities, of which an empty answer has none, or rewards, of which a cut-off one has none.
        head: of the rewards; None for log-probabilities. Labels of other heads are left out, and for log-probabilities
            those on an answer alone; with a reward it is compared with 0.
    """
    sides, weights, start = [], [], 0
    for answers in records:
        has_value = []
        for answer in answers:
            has_value.append(any(answer.score_mask) if head is None else answer.reward_position is not None)
        for label in labels_of(answers):
            indices = [label.better, label.worse]
            is_compared = label.is_pair if head is None else label.head in (None, head)
            if is_compared and all(index is None or has_value[index] for index in indices):
                sides.append([0.0 if index is None else values[start + index] for index in indices])
                weights.append(label.weight)
        start += len(answers)
    return sides, weights


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
