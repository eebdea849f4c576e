"""Probabilities from rewards: Platt's calibration, its errors, and the share of wrong labels in preferences.

An answer with reward r is good with probability sigmoid((r - midpoint) / temperature). Before calibration it is
sigmoid(r), which the separable objective trains.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dph.errors import UserError
from dph.evaluate.metrics import Interval, resampled, wilson

BINS = 15  # of equal width, of the expected calibration error (Guo et al. 2017)
RESAMPLES = 200  # of the bootstrap of the label noise, and of labels that fit the probabilities
MIN_PROMPTS = 10  # to fit on one half and to judge on the other


class Calibration(NamedTuple):
    """A reward's scale: the probability of a good answer is sigmoid((reward - midpoint) / temperature)."""

    temperature: float
    midpoint: float

    def probability(self, rewards: np.ndarray) -> np.ndarray:
        """Return the probabilities of rewards of any shape."""
        from scipy.special import expit

        return expit((np.asarray(rewards, dtype=float) - self.midpoint) / self.temperature)


UNCALIBRATED = Calibration(1.0, 0.0)


def recorded(about: Mapping[str, Any]) -> Calibration:
    """Return the calibration in the record of a head, which ``dph card`` has fitted; UNCALIBRATED if there is none."""
    return Calibration(**about["calibration"]) if about.get("calibration") is not None else UNCALIBRATED


class Bin(NamedTuple):
    """Answers whose probability lies in one of the bins: their number, mean probability, and share of good ones."""

    n: int
    probability: float
    good: Interval


class Errors(NamedTuple):
    """Expected calibration error, its mean if the probabilities were right, Brier score, and the bins with answers.

    Few answers have an error however right the probabilities are.
    """

    ece: float
    ece_by_chance: float
    brier: float
    bins: tuple[Bin, ...]


def fit(rewards: np.ndarray, is_good: np.ndarray) -> Calibration:
    """Return the calibration of rewards [A] by the labels [A], by maximum likelihood (Platt 1999).

    The labels are Platt's, (n + 1) / (n + 2) of a class of n answers, so that rewards which separate the classes have a
    finite temperature. Raises UserError if one class is empty, or if good answers have no higher rewards.
    """
    from sklearn.linear_model import LogisticRegression

    rewards, is_good = np.asarray(rewards, dtype=float), np.asarray(is_good, dtype=bool)
    counts = int(is_good.sum()), int((~is_good).sum())
    if 0 in counts:
        raise UserError(f"calibration: expected good and bad answers, got {counts[0]} good and {counts[1]} bad")
    scale = float(rewards.std())
    if not scale > 0 or not rewards[is_good].mean() > rewards[~is_good].mean():
        raise UserError("calibration: expected good answers to have higher rewards than bad ones, got lower or equal")
    target = np.where(is_good, (counts[0] + 1) / (counts[0] + 2), 1 / (counts[1] + 2))
    classes = np.repeat([1, 0], len(rewards))
    features = np.tile((rewards - rewards.mean()) / scale, 2)[:, None]
    fitted = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(features, classes, np.r_[target, 1 - target])
    slope, intercept = float(fitted.coef_[0, 0]) / scale, float(fitted.intercept_[0])
    return Calibration(1 / slope, float(rewards.mean()) - intercept / slope)


def errors(probabilities: np.ndarray, is_good: np.ndarray, seed: int = 0) -> Errors:
    """Return how far probabilities [A] are from the labels [A]; ``seed`` of the labels drawn from them."""
    from sklearn.metrics import brier_score_loss

    probabilities, is_good = np.asarray(probabilities, dtype=float), np.asarray(is_good, dtype=bool)
    _, numbers, counts = np.unique(
        np.minimum((probabilities * BINS).astype(int), BINS - 1), return_inverse=True, return_counts=True
    )
    sums = np.bincount(numbers, probabilities)

    def ece(labels: np.ndarray) -> float:
        return float(np.abs(np.bincount(numbers, labels) - sums).sum() / len(probabilities))

    drawn = np.random.default_rng(seed).random((RESAMPLES, len(probabilities))) < probabilities
    bins = []
    for count, total, good in zip(counts, sums, np.bincount(numbers, is_good), strict=True):
        bins.append(Bin(int(count), float(total / count), wilson(float(good), int(count))))
    by_chance = float(np.mean(list(map(ece, drawn))))
    return Errors(ece(is_good), by_chance, float(brier_score_loss(is_good, probabilities)), tuple(bins))


def halves(prompts: Sequence[Hashable]) -> np.ndarray:
    """Return [A] whether each answer belongs to the first half of the prompts, in the order of their appearance.

    Every other prompt is in it. Raises UserError for fewer than MIN_PROMPTS prompts.
    """
    numbers: dict[Hashable, int] = {}
    for prompt in prompts:
        numbers.setdefault(prompt, len(numbers))
    if len(numbers) < MIN_PROMPTS:
        raise UserError(f"calibration: expected at least {MIN_PROMPTS} prompts, got {len(numbers)}")
    return np.array([numbers[prompt] % 2 == 0 for prompt in prompts])


def crossed(rewards: np.ndarray, is_good: np.ndarray, prompts: Sequence[Hashable]) -> np.ndarray:
    """Return probabilities [A], those of each half of the prompts by the calibration that the other half gives."""
    first = halves(prompts)
    probabilities = np.empty(len(rewards))
    for own in (first, ~first):
        probabilities[own] = fit(rewards[~own], is_good[~own]).probability(rewards[own])
    return probabilities


def label_noise(margins: np.ndarray, prompts: Sequence[Hashable], seed: int = 0) -> Interval:
    """Estimate the share of preferences whose sides are exchanged, from the margins [P] of a head on held-out ones.

    With margin m the first side is better with probability sigmoid(m / T), and a label is wrong with probability ε, so
    that a pair has the likelihood (1 - ε) sigmoid(m / T) + ε sigmoid(-m / T). The best ε is taken over grids of T and
    of ε from 0 to 0.5; its 95% interval is the percentile bootstrap's over prompts. A pair that the head itself gets
    wrong with a large margin counts as noise, too; a head without large margins shows none, whatever the labels.

    Raises UserError for fewer than MIN_PROMPTS prompts.
    """
    from scipy.special import expit

    if (count := len(set(prompts))) < MIN_PROMPTS:
        raise UserError(f"label noise: expected at least {MIN_PROMPTS} prompts, got {count}")
    weights = np.concatenate([np.ones((1, len(margins))), resampled(prompts, RESAMPLES, seed)])  # [1 + RESAMPLES, P]
    scaled = np.asarray(margins, dtype=float) / (np.abs(margins).mean() or 1.0)
    epsilons = np.linspace(0.0, 0.5, 201)[:, None]
    likelihoods = []  # [1 + RESAMPLES, 201] for each temperature
    for temperature in np.geomspace(0.02, 20.0, 60):
        is_right = expit(scaled / temperature)
        pair = is_right + epsilons * (1 - 2 * is_right)  # [201, P]
        likelihoods.append(weights @ np.log(np.maximum(pair, np.finfo(float).tiny)).T)
    best = np.max(likelihoods, axis=0).argmax(1)
    value, *drawn = epsilons[best, 0]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))
