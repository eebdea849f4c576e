"""Metrics of predictions against references, and 95% intervals of figures.

F1 and Matthews correlation are scikit-learn's, Pearson and Spearman correlation scipy's. Both packages are imported on
the first call, because they take over a second to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
"""(predictions [n], references [n]) -> figure."""


def accuracy(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Share of predictions that equal the reference."""
    return float(np.mean(predicted == gold))


def f1(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if neither array contains it."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold == 1, predicted == 1, zero_division=0.0))


def matthews(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004); 0 if either array is constant."""
    from sklearn.metrics import matthews_corrcoef

    if _is_constant(predicted) or _is_constant(gold):
        return 0.0
    codes = _codes(np.concatenate([gold, predicted]))
    return float(matthews_corrcoef(codes[: len(gold)], codes[len(gold) :]))


def pearson(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Pearson correlation; 0 if either array is constant, for which scipy returns NaN, and NaN if either has a NaN."""
    from scipy.stats import pearsonr

    if np.isnan(predicted).any() or np.isnan(gold).any():
        return math.nan
    if _is_constant(predicted) or _is_constant(gold):
        return 0.0
    return float(pearsonr(predicted, gold).statistic)


def spearman(predicted: np.ndarray, gold: np.ndarray) -> float:
    """Spearman correlation, equal values sharing their mean rank; 0 if either array is constant."""
    from scipy.stats import spearmanr

    if _is_constant(predicted) or _is_constant(gold):
        return 0.0
    return float(spearmanr(_codes(predicted), _codes(gold)).statistic)


def _codes(values: np.ndarray) -> np.ndarray:
    """Index of each value among the different values in ascending order; NaN is one of them, the last."""
    return np.unique(values, return_inverse=True)[1]


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


def bootstrap(
    metric: Metric, predicted: np.ndarray, gold: np.ndarray, resamples: int = 1000, seed: int = 0
) -> Interval:
    """``metric`` with the 95% interval of the percentile bootstrap over records."""
    rng, n = np.random.default_rng(seed), len(gold)
    figures = []
    for _ in range(resamples):
        drawn = rng.integers(n, size=n)
        figures.append(metric(predicted[drawn], gold[drawn]))
    low, high = np.percentile(figures, [2.5, 97.5])
    return Interval(metric(predicted, gold), float(low), float(high))


def wilson(successes: float, n: int) -> Interval:
    """A proportion with Wilson's 95% interval (1927), which keeps its coverage near 0 and 1."""
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    z, proportion = 1.959964, successes / n
    centre = (proportion + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z / (1 + z**2 / n) * math.sqrt(proportion * (1 - proportion) / n + z**2 / (4 * n**2))
    return Interval(proportion, max(centre - half_width, 0.0), min(centre + half_width, 1.0))
