"""Metrics on held-out records: of each source, and over all of them together."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dph.data.formats import Record
from dph.data.sampler import InOrder
from dph.errors import UserError
from dph.train.stages.labelled import answer_labels

if TYPE_CHECKING:
    from dph.train.stages.base import Stage
    from dph.train.stages.preference import PairMicroBatch

# Start of a reason for refusing a pair (``dph.data.packing.PairBatches``) -> key of the recipe for the limit.
LIMITS = {"longer than": "data.context", "more than": "batch.tokens"}


Sums = dict[str, tuple[float, float]]  # metric -> its sum over the items of a source, number of items


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
        """Return the sum of each metric over the items of one source, and the number of items."""

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

    A tie or NaN counts as wrong. If the stage caches the states of a frozen backbone, the first evaluation computes
    the log-probability accuracy, which stays the same, and later evaluations read rewards from the cached states.

    Raises UserError for a source that gives no pair.
    """

    def __init__(self, stage: Stage, sources: Mapping[str, Sequence[Record]]) -> None:
        self.stage = weakref.proxy(stage)
        self.heads = stage.recipe.objective.heads if stage.rewarded else ()
        reward_metrics = ["reward_accuracy"] * len(self.heads)
        if len(self.heads) > 1:
            reward_metrics = [f"reward_accuracy_{head}" for head in self.heads]
        super().__init__(sources, (*reward_metrics, "logprob_accuracy"))
        self._logprob_correct: dict[str, tuple[float, float]] = {}  # by source, for a frozen backbone
        self._batches: dict[str, Any] = {}  # of the last evaluation, by source
        for name, records in sources.items():  # an error now rather than at the first evaluation
            batches = stage.open_pairs(InOrder(records), 1)
            if next(batches, None) is None:
                raise UserError(f"{name}: expected held-out pairs, got none: {refusal_message(batches)}")

    def sums(self, name: str, records: Sequence[Record]) -> Sums:
        """Return, for each metric, the weight of the correct labels and that of all: plain pairs have weight 1.

        Of an answer that is labelled alone, the reward has to be above or below 0.
        """
        stage, all_finished = self.stage, True
        correct, counts = Counter(), Counter()
        frozen_correct = self._logprob_correct.get(name)
        self._batches[name] = stage.open_pairs(InOrder(records), stage.micro_size)
        for pairs in self._batches[name]:
            lengths = list(map(stage.micro_batch_class.length, pairs))
            for micro_batch in stage.micro_batches(pairs, lengths):
                columns: list[tuple[str, Tensor]] = []
                if frozen_correct is not None:
                    rewards = stage.model.rewards_of(stage.frozen(micro_batch))
                else:
                    out = stage.model.forward_packed(micro_batch.packed.to(stage.model.device))
                    rewards = out.rewards
                    columns.append(("logprob_accuracy", out.mean_logprobs))
                columns += [(metric, rewards[head]) for metric, head in zip(self.metrics, self.heads, strict=False)]
                self._add(correct, counts, micro_batch, columns)
                all_finished = all_finished and micro_batch.finished
        if frozen_correct is not None:
            correct["logprob_accuracy"], counts["logprob_accuracy"] = frozen_correct
        elif stage.frozen.kind == "states" and stage.frozen.cached and all_finished:
            self._logprob_correct[name] = correct["logprob_accuracy"], counts["logprob_accuracy"]
        return {metric: (correct[metric], counts[metric]) for metric in self.metrics}

    def _add(
        self,
        correct: Counter[str],
        counts: Counter[str],
        micro_batch: PairMicroBatch,
        columns: list[tuple[str, Tensor]],
    ) -> None:
        """Add the weights of correct labels and of all labels, by each metric's values of the answers [A]."""
        for metric, values in columns:
            if micro_batch.totals is None:
                correct[metric] += count_larger_chosen(values)
                counts[metric] += len(micro_batch.pairs)
                continue
            labels = answer_labels(micro_batch.pairs, self.heads, micro_batch.totals, values.device)
            weights = labels.weights.pairs  # [P]
            if metric != "logprob_accuracy":
                head = self.metrics.index(metric)
                weights = torch.maximum(labels.weights.chosen[:, head], labels.weights.rejected[:, head])
            better, worse = labels.sides(values)
            correct[metric] += float(weights[better > worse].sum())
            counts[metric] += float(weights.sum())

    def left_out(self) -> dict[str, str]:
        """Return messages, by source, about the records that the last evaluation left out."""
        messages = {}
        for name, batches in self._batches.items():
            if batches.refused:
                messages[f"records of {name}"] = refusal_message(batches, f"records of {name}")
        return messages


def count_larger_chosen(values: torch.Tensor) -> int:
    """Return the number of pairs whose chosen answer has the larger value; ``values`` [2N], the two in turn."""
    return int((values[0::2] > values[1::2]).sum())


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
    """Return the means over all sources together and, if there are several, of each; none without items."""
    totals: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    means: dict[str, float] = {}
    for name, sums in sources.items():
        for metric, (total, count) in sums.items():
            totals[metric] += total
            counts[metric] += count
            if count:
                means[f"{metric}/{name}"] = total / count
    overall = {metric: total / counts[metric] for metric, total in totals.items() if counts[metric]}
    return overall | means if len(sources) > 1 else overall
