"""Best of N: the share of right answers among chosen ones, for every N and by each rule of choosing.

The candidates of a prompt are a sample of what a model says. Figures for N are means over all choices of N of them: by
a score exactly, from the ranks of the candidates; by a vote exactly for few choices, else over RESAMPLES drawn ones.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from dph.evaluate.metrics import Interval, resampled, wilson_of_groups

RESAMPLES = 200  # sets of N candidates of a prompt for a vote
PROMPT_RESAMPLES = 1000  # of the prompts, for the intervals of differences
# A minus after a letter or digit is a hyphen or a difference.
NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
ROUNDING = 1e-9  # differences of means that are no larger are none

Normalise = Callable[[str], str]
Probability = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scored:
    """Candidates of one prompt: texts, how right each is (0 to 1), by rule their scores, and which ones may vote."""

    texts: Sequence[str]
    correct: np.ndarray
    scores: Mapping[str, np.ndarray]
    voters: np.ndarray


def scored(
    texts: Sequence[str],
    correct: Sequence[float],
    scores: Mapping[str, Sequence[float | None]],
    finished: Sequence[bool] | None = None,
) -> Scored:
    """Return candidates with their scores; None, the mean log-probability of an empty answer, comes last.

    Those that are not ``finished`` (None: all are) do not vote.
    """
    values = {rule: np.array([-np.inf if x is None else x for x in own]) for rule, own in scores.items()}
    voters = np.ones(len(texts)) if finished is None else np.array(finished, dtype=float)
    return Scored(texts, np.array(correct), values, voters)


@dataclass(frozen=True)
class Curve:
    """The share of right answers of one rule for each N in ``ns``, with its 95% interval over prompts.

    ``enough`` is the smallest N that no larger one improves on with a 95% interval of the difference above 0, by the
    bootstrap over prompts.
    """

    rule: str
    ns: tuple[int, ...]
    right: tuple[Interval, ...]
    enough: int
    prompts: int


def number(text: str) -> str:
    """Return the last number of a text, without separators of thousands and trailing zeros; the text without one."""
    found = NUMBER.findall(text)
    if not found:
        return words(text)
    return f"{(Decimal(found[-1].replace(',', '')) + 0).normalize():f}"  # + 0: -0 is 0


def words(text: str) -> str:
    """Return a text in lower case without punctuation, articles and repeated spaces, as far as something is left."""
    kept = re.sub(r"[^\w\s]", " ", text.casefold()).split()
    return " ".join(word for word in kept if word not in ("a", "an", "the")) or " ".join(kept) or text.strip()


NORMALISERS: dict[str, Normalise] = {"words": words, "number": number}


def right_of_best(scores: np.ndarray, correct: np.ndarray, n: int) -> float:
    """Return how often the best of ``n`` candidates is right, over all choices of n of the M.

    The candidate on rank i (of M from 0) is the best of C(M - 1 - i, n - 1) choices. Of equal scores each is the best
    equally often. More than M candidates are all of them.
    """
    count = len(scores)
    n = min(n, count)
    values, group = np.unique(-np.asarray(scores, dtype=float), return_inverse=True)
    order = np.argsort(group, kind="stable")
    means = np.bincount(group, correct, len(values)) / np.bincount(group, minlength=len(values))
    shares = np.array([math.comb(count - 1 - rank, n - 1) / math.comb(count, n) for rank in range(count)])
    return float(shares @ means[group[order]])


def right_of_vote(
    answers: Sequence[str], weights: np.ndarray, correct: np.ndarray, n: int, rng: np.random.Generator
) -> float:
    """Return how often the answer with the largest sum of weights among ``n`` candidates is right.

    Equal answers count as one, which is as right as the mean of its candidates; a tie is shared.
    """
    count = len(answers)
    n = min(n, count)
    _, group = np.unique(np.array(answers), return_inverse=True)
    total = group.max() + 1
    if math.comb(count, n) <= max(RESAMPLES, count):
        drawn = np.array(list(itertools.combinations(range(count), n)))
    else:
        drawn = np.argsort(rng.random((RESAMPLES, count)), 1)[:, :n]
    rows = np.arange(len(drawn))[:, None]
    sums, right, sizes = (np.zeros((len(drawn), total)) for _ in range(3))
    np.add.at(sums, (rows, group[drawn]), weights[drawn])
    np.add.at(right, (rows, group[drawn]), correct[drawn])
    np.add.at(sizes, (rows, group[drawn]), 1)
    sums[sizes == 0] = -np.inf
    best = np.isclose(sums, sums.max(1, keepdims=True), rtol=1e-12, atol=0)
    return float(((best * right / np.maximum(sizes, 1)).sum(1) / best.sum(1)).mean())


def curves(
    prompts: Sequence[Scored], normalise: Normalise, probabilities: Mapping[str, Probability], seed: int = 0
) -> list[Curve]:
    """Return the curves of a random choice, of each score, of votes, and of an oracle.

    N is 1, 2, 4, ... up to the most candidates of a prompt; a prompt with fewer has all of its own chosen from.

    Args:
        prompts: candidates, at least one prompt.
        normalise: answers that become equal count as one in a vote.
        probabilities: rule -> function from its scores to the weights of a vote, besides the vote of equal weights.
    """
    most = max(len(prompt.texts) for prompt in prompts)
    ns = (*(2**i for i in range(most.bit_length()) if 2**i < most), most)
    figures: dict[str, list[list[float]]] = {"random": []}  # rule -> for each prompt, a figure for each N
    for index, prompt in enumerate(prompts):
        correct = np.asarray(prompt.correct, dtype=float)
        answers = [normalise(text) for text in prompt.texts]
        figures["random"].append([float(correct.mean())] * len(ns))
        for rule, scores in prompt.scores.items():
            figures.setdefault(rule, []).append([right_of_best(scores, correct, n) for n in ns])
        votes = {"vote": prompt.voters}
        for rule, probability in probabilities.items():
            votes[f"vote by {rule}"] = probability(prompt.scores[rule]) * prompt.voters
        for rule, weights in votes.items():
            shares = [right_of_vote(answers, weights, correct, n, np.random.default_rng((seed, index, n))) for n in ns]
            figures.setdefault(rule, []).append(shares)
        figures.setdefault("oracle", []).append([right_of_best(correct, correct, n) for n in ns])
    weights = resampled(range(len(prompts)), PROMPT_RESAMPLES, seed) / len(prompts)
    return [_curve(rule, ns, np.array(values), weights) for rule, values in figures.items()]


def _curve(rule: str, ns: tuple[int, ...], values: np.ndarray, weights: np.ndarray) -> Curve:
    """Return the curve of one rule from figures [prompts, N], and the prompts' weights in each resample."""
    means = weights @ values  # [resamples, N]
    prompts = np.repeat(np.arange(len(values)), ns[-1]).tolist()  # a figure is a mean over as many candidates at most
    right = [wilson_of_groups(np.repeat(figures, ns[-1]), prompts) for figures in values.T]
    for enough in range(len(ns)):  # ends with the last one at the latest
        gains = means[:, enough + 1 :] - means[:, [enough]]
        if not np.any(np.percentile(gains, 2.5, axis=0) > ROUNDING):
            break
    return Curve(rule, ns, tuple(right), ns[enough], len(values))
