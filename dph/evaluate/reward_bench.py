"""Figures of RewardBench 2 (arXiv 2506.01937) from scores of candidates: accuracy by subset, and the score of Ties."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dph.errors import UserError, shown
from dph.evaluate.metrics import Interval, wilson

TIES = "Ties"  # its rows have ids "ref:N" (one right answer) and "tied:N" (several)


class Prompt(NamedTuple):
    """Scores of the candidates of a prompt, whether each is right, and the row's subset and id."""

    scores: np.ndarray
    correct: np.ndarray
    subset: str
    id: str


class Subset(NamedTuple):
    """Figure of one subset: the share of prompts whose best candidate is right; of Ties the benchmark's own score."""

    name: str
    n: int
    value: float
    interval: Interval | None


def by_subset(prompts: Sequence[Prompt]) -> list[Subset]:
    """Return the figure of each subset, and the mean of them ("all", without an interval) if there are several.

    Of k candidates that share the best score each counts 1/k. Raises UserError for an id in Ties of another form.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.subset, []).append(prompt)
    found = []
    for name, group in groups.items():
        if name == TIES:
            found.append(Subset(name, len(group), ties(group), None))
            continue
        right = sum(float(prompt.correct[prompt.scores == prompt.scores.max()].mean()) for prompt in group)
        interval = wilson(right, len(group))
        found.append(Subset(name, len(group), interval.value, interval))
    if len(found) > 1:
        found.append(Subset("all", len(prompts), float(np.mean([subset.value for subset in found])), None))
    return found


def ties(prompts: Sequence[Prompt]) -> float:
    """Return the score of the subset Ties, 0.6 of it for accuracy and 0.4 for margins (0.01 more for their size).

    A prompt is right if its worst right answer scores above its best wrong one. The spread of several right answers
    should be smaller than the margin to the wrong ones, there and for the same prompt with one right answer.
    """
    spreads: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    margins: dict[str, dict[str, float]] = {"ref": {}, "tied": {}}
    for prompt in prompts:
        kind, _, number = prompt.id.partition(":")
        if kind not in margins or not number:
            raise UserError(f"id: expected ref:N or tied:N in the subset {TIES}, got {shown(prompt.id)}")
        right, wrong = prompt.scores[prompt.correct > 0.5], prompt.scores[prompt.correct <= 0.5]
        if not len(right) or not len(wrong):
            raise UserError(f"{prompt.id}: expected right and wrong candidates, got {len(right)} and {len(wrong)}")
        spreads[kind][number] = float(np.ptp(right))
        margins[kind][number] = float(right.min() - wrong.max())
    accuracies = [np.mean([margin > 0 for margin in values.values()] or [0.0]) for values in margins.values()]
    score = 0.3 * sum(map(float, accuracies))
    both = margins["ref"].keys() & margins["tied"].keys()
    if not both:
        return score
    own, hard, size = [], [], []
    for number in both:
        spread = spreads["tied"][number]
        smallest = min(margins["ref"][number], margins["tied"][number])
        own.append(margins["tied"][number] > spread)
        hard.append(smallest > spread)
        size.append(math.tanh(smallest / spread - 1) if spread else float(np.sign(smallest)))  # limit of no spread
    return score + float(0.2 * np.mean(own) + 0.2 * np.mean(hard) + 0.01 * np.mean(size))
