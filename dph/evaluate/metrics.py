"""Choices by scores, their metrics against references, and 95% intervals of figures.

A score chooses the best of a record's choices; of k that share the best score, each is chosen with the share 1/k. The
interval of a share of records is Wilson's, that of another metric the bootstrap's over records.

F1 and Matthews correlation are scikit-learn's, Pearson and Spearman correlation scipy's. Both packages are imported on
the first call, because they take over a second to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(shares [n, K] of each record's choices, references [n]: indices of choices, or scores) -> figure."""


def chosen_shares(scores: Sequence[Sequence[float]], place: Callable[[int], str] = "record {}".format) -> np.ndarray:
    """Return the shares [n, K] with which each record's choices are chosen, for K the most choices of a record.

    Args:
        scores: of each record, a score for each of its choices.
        place: returns the name of a record, given its index, for the error.

    Raises RuntimeError as :func:`check_finite`.
    """
    shares = np.zeros((len(scores), max(map(len, scores), default=0)))
    for i, values in enumerate(scores):
        check_finite(values, place(i))
        is_best = np.equal(values, max(values))
        shares[i, : len(values)] = is_best / is_best.sum()
    return shares


def check_finite(scores: Sequence[float], where: str) -> None:
    """Raise RuntimeError, which begins with ``where``, if a score is NaN or infinite."""
    if not all(map(math.isfinite, scores)):
        raise RuntimeError(f"{where}: expected finite numbers, got {list(scores)}: the model's weights are broken")


def accuracy(shares: np.ndarray, gold: np.ndarray) -> float:
    """Share of records whose reference is chosen."""
    return float(np.mean(_shares_of_references(shares, gold)))


def f1(shares: np.ndarray, gold: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if it is neither chosen nor a reference."""
    from sklearn.metrics import f1_score

    predicted, references, weights = _predictions(shares, gold)
    return float(f1_score(references == 1, predicted == 1, sample_weight=weights, zero_division=0.0))


def matthews(shares: np.ndarray, gold: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 if choices or references are constant."""
    from sklearn.metrics import matthews_corrcoef

    predicted, references, weights = _predictions(shares, gold)
    if _is_constant(predicted) or _is_constant(gold):
        return 0.0
    return float(matthews_corrcoef(references, predicted, sample_weight=weights))


def pearson(shares: np.ndarray, gold: np.ndarray) -> float:
    """Pearson correlation of references and mean choices; 0 if either is constant, for which scipy returns NaN."""
    return _correlation("pearsonr", shares, gold)


def spearman(shares: np.ndarray, gold: np.ndarray) -> float:
    """Spearman correlation of references and mean choices, equal values sharing their mean rank; 0 as ``pearson``."""
    return _correlation("spearmanr", shares, gold)


def _correlation(name: str, shares: np.ndarray, gold: np.ndarray) -> float:
    from scipy import stats

    predicted = shares @ np.arange(shares.shape[1])
    if _is_constant(predicted) or _is_constant(gold):
        return 0.0
    return float(getattr(stats, name)(predicted, gold).statistic)


def _shares_of_references(shares: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Return [n] the share of each record's reference."""
    return shares[np.arange(len(gold)), gold.astype(int)]


def _predictions(shares: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return chosen classes, their records' references and weights: a row for each choice that has a share."""
    records, predicted = np.nonzero(shares)
    return predicted, gold[records], shares[records, predicted]


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.all(values == values[:1]))


# Task.metric -> the metrics that are reported for it.
METRICS: dict[str, tuple[Metric, ...]] = {
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
        """The interval as text for a table."""
        return f"{self.low:.3f} to {self.high:.3f}"


def with_interval(metric: Metric, shares: np.ndarray, gold: np.ndarray) -> Interval:
    """``metric`` with its 95% interval: Wilson's of an accuracy, else the bootstrap's."""
    if metric is accuracy:
        return wilson(float(_shares_of_references(shares, gold).sum()), len(gold))
    return bootstrap(metric, shares, gold)


def bootstrap(metric: Metric, shares: np.ndarray, gold: np.ndarray, resamples: int = 1000, seed: int = 0) -> Interval:
    """``metric`` with the 95% interval of the percentile bootstrap over records."""
    rng, n = np.random.default_rng(seed), len(gold)
    figures = []
    for _ in range(resamples):
        drawn = rng.integers(n, size=n)
        figures.append(metric(shares[drawn], gold[drawn]))
    low, high = np.percentile(figures, [2.5, 97.5])
    return Interval(metric(shares, gold), float(low), float(high))


def resampled(groups: Iterable[Hashable], resamples: int, seed: int = 0) -> np.ndarray:
    """Return the weights [resamples, n] of n items in the bootstrap over their groups: how often each group is drawn.

    Items of one prompt, for instance, are no independent sample, so that the prompts are drawn.
    """
    numbers: dict[Hashable, int] = {}
    members = [numbers.setdefault(group, len(numbers)) for group in groups]
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(numbers), [1 / len(numbers)] * len(numbers), resamples)[:, members]


def wilson_of_groups(shares: np.ndarray, groups: Sequence[Hashable]) -> Interval:
    """The mean of shares [n] with Wilson's 95% interval for the effective number of independent ones.

    Shares of one group, such as pairs of one prompt, depend on each other. The effective number is that with which the
    variance of a proportion is the variance between groups (Korn and Graubard 1998); n if each is a group of its own,
    and the number of groups if all shares are 0 or all are 1.
    """
    n, mean = len(shares), float(np.mean(shares))
    numbers: dict[Hashable, int] = {}
    members = [numbers.setdefault(group, len(numbers)) for group in groups]
    count = len(numbers)
    if count == n:
        return wilson(float(np.sum(shares)), n)
    effective = float(count)
    if count > 1 and 1e-9 < mean < 1 - 1e-9:
        variance = count / (count - 1) * float(np.sum(np.bincount(members, shares - mean) ** 2)) / n**2
        effective = min(max(mean * (1 - mean) / variance, 1.0), n) if variance else n
    return replace(wilson(mean * effective, effective), value=mean)


def wilson(successes: float, n: float) -> Interval:
    """A proportion with Wilson's 95% interval (1927), which keeps its coverage near 0 and 1."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    z, proportion = 1.959964, successes / n
    centre = (proportion + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(proportion * (1 - proportion) / n + z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else max(centre - half_width, 0.0)  # exact, without the rounding of a difference
    high = 1.0 if successes == n else min(centre + half_width, 1.0)
    return Interval(proportion, low, high)
