"""Answers judged by log-probability and by reward in one packed pass, and what the judgements are worth.

Every alternative of a record is scored together with its siblings, their shared beginning computed once. A NaN is an
error: the record counts as answered wrong and is counted, whatever the other alternatives got. Equal best scores are
counted as ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dph import chat
from dph.errors import UserError

if TYPE_CHECKING:
    from dph.model.model import Model
    from dph.tasks import Task

# Metrics. Predictions and references are arrays [n].


def accuracy(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Share of predictions that equal the reference."""
    return float(np.mean(predicted == gold))


def f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where neither array holds it."""
    hits = np.sum((predicted == 1) & (gold == 1))
    named = np.sum(predicted == 1) + np.sum(gold == 1)
    return float(2 * hits / named) if named else 0.0


def matthews(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Matthews correlation, for any number of classes (Gorodkin 2004); 0 where either array is constant."""
    classes, codes = np.unique(np.concatenate([gold, predicted]), return_inverse=True)
    k, n = len(classes), len(gold)
    counts = np.bincount(codes[:n] * k + codes[n:], minlength=k * k).reshape(k, k).astype(float)
    true, named = counts.sum(1), counts.sum(0)
    spread = math.sqrt((n**2 - named @ named) * (n**2 - true @ true))
    return float((np.trace(counts) * n - true @ named) / spread) if spread else 0.0


def pearson(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Pearson correlation; 0 where either array is constant, since that tells nothing."""
    x, y = predicted - np.mean(predicted), gold - np.mean(gold)
    spread = math.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread else 0.0


def spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Pearson correlation of ranks, equal values sharing their mean rank."""
    return pearson(_ranks(predicted), _ranks(gold))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


# Task.metric -> what is reported.
METRICS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], ...]] = {
    "accuracy": (accuracy,),
    "f1": (f1, accuracy),
    "matthews": (matthews,),
    "pearson_spearman": (pearson, spearman),
}


@dataclass(frozen=True)
class Interval:
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def range(self) -> str:
        """The interval, as in a table."""
        return f"{self.low:.3f} to {self.high:.3f}"


def bootstrap(
    metric: Callable[[np.ndarray, np.ndarray], float],
    predicted: np.ndarray,
    gold: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """``metric`` with the percentile bootstrap's 95% interval over records."""
    rng, n = np.random.default_rng(seed), len(gold)
    draws = (rng.integers(n, size=n) for _ in range(resamples))
    low, high = np.percentile([metric(predicted[i], gold[i]) for i in draws], [2.5, 97.5])
    return Interval(metric(predicted, gold), float(low), float(high))


def wilson(successes: float, n: int) -> Interval:
    """A share with Wilson's 95% interval (1927), which stays honest near 0 and 1."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    z, share = 1.959964, successes / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


# Choices


@dataclass(frozen=True)
class Row:
    """One way of choosing: its figures, records whose best score is shared, and records with a NaN."""

    method: str
    metrics: dict[str, Interval]
    ties: int
    nans: int


@dataclass(frozen=True)
class Report:
    """One task: ``n`` records, a row per way of choosing."""

    task: str
    n: int
    rows: tuple[Row, ...]

    @property
    def nans(self) -> int:
        """Records with a NaN, over all rows."""
        return sum(row.nans for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain dictionaries, for JSON."""
        return asdict(self)


def evaluate(
    model: Model,
    tokenizer: Any,
    task: Task,
    docs: Iterable[Mapping[str, Any]],
    *,
    head: str | None = "default",
    max_tokens: int = 16_384,
) -> Report:
    """Score all choices of every record and report the task's metric.

    Args:
        docs: records of ``task``, for instance ``task.documents("validation")``.
        head: the reward head that judges; None: by log-probability only.
        max_tokens: bound on the tokens of a packed batch.

    Raises ValueError where the head is missing or untrained, UserError where the task has no choices or a record no
    reference, and where there are no records.
    """
    if head is not None:
        model.check_heads(head)
    if task.metric is None:
        raise UserError(f"task {task.name}: expected one with choices to score, got one that is answered freely")
    gold: list[float] = []
    judged = model.judge(_choices(task, docs, tokenizer, gold), max_tokens)
    if not judged:
        raise UserError(f"task {task.name}: expected at least one record, got none")
    scores = {"log-probability": [j.mean_logprobs for j in judged]}
    if head is not None:
        scores["reward"] = [j.rewards[head] for j in judged]
    rows = tuple(_row(method, values, np.array(gold), METRICS[task.metric]) for method, values in scores.items())
    return Report(task.name, len(gold), rows)


def _choices(
    task: Task, docs: Iterable[Mapping[str, Any]], tokenizer: Any, gold: list[float]
) -> Iterator[list[chat.Encoded]]:
    """Every record's choices, encoded; the references are appended to ``gold``."""
    for i, doc in enumerate(docs):
        try:
            choices, reference = task.labelled(doc)
        except UserError as error:
            raise UserError(f"record {i}: {error}") from error
        if reference is None:
            raise UserError(
                f"task {task.name}, record {i}: expected a label, got none; this split's answers are hidden"
            )
        gold.append(reference)
        yield [chat.encode(choice, tokenizer, last_only=True) for choice in choices]


def _row(method: str, scores: Sequence[Sequence[float]], gold: np.ndarray, metrics: Sequence[Callable]) -> Row:
    predicted = np.array([choose(s, g) for s, g in zip(scores, gold.tolist(), strict=True)])
    nans = [any(map(math.isnan, s)) for s in scores]
    ties = sum(not nan and s.count(max(s)) > 1 for s, nan in zip(map(list, scores), nans, strict=True))
    return Row(method, {m.__name__: bootstrap(m, predicted, gold) for m in metrics}, ties, sum(nans))


def choose(scores: Sequence[float], gold: float) -> int:
    """The index of the best score, the first of equals; with a NaN among them, the one farthest from ``gold``."""
    if not any(map(math.isnan, scores)):
        return max(range(len(scores)), key=scores.__getitem__)
    return max(range(len(scores)), key=lambda i: abs(i - gold)) if len(scores) > 1 else -1


# Pairs


@dataclass(frozen=True)
class PairRow:
    """How often one score prefers the chosen answer.

    Attributes:
        accuracy: share of pairs, a tie counting half; Wilson's interval. None where there are no pairs.
        margin: mean difference of the two scores, NaNs left out; None where nothing is left.
    """

    method: str
    accuracy: Interval | None
    margin: float | None
    ties: int
    nans: int
    n: int


def prefer(method: str, chosen: Sequence[float], rejected: Sequence[float]) -> PairRow:
    """Compare the scores [n] of chosen and rejected answers."""
    margins = np.array(chosen, dtype=float) - np.array(rejected, dtype=float)
    known = margins[~np.isnan(margins)]
    ties = int(np.sum(known == 0))
    return PairRow(
        method,
        wilson(float(np.sum(known > 0)) + ties / 2, len(margins)) if len(margins) else None,
        float(known.mean()) if len(known) else None,
        ties,
        len(margins) - len(known),
        len(margins),
    )
