"""Head card: what a reward head is worth on answers that it has not learnt from, and how to read its rewards.

A card is a dictionary for JSON (:func:`card`); :func:`markdown` writes it as text, and ``dph.evaluate.card_figure``
draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dph.errors import UserError
from dph.evaluate import best_of, calibration
from dph.evaluate.choices import prefer
from dph.evaluate.metrics import chosen_shares, wilson_of_groups
from dph.evaluate.tables import markdown_table

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.data.labels import Label
    from dph.evaluate.best_of import Normalise, Scored
    from dph.model.judging import Judged

RULES = {"reward": "reward", "sum": "log-probability (sum)", "mean": "log-probability (mean)"}
LENGTH_BINS = 5  # with about as many pairs each
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Judgements:
    """Scores of A labelled answers, and of the P pairs among them.

    Attributes:
        rewards, lengths, is_good, prompts: [A] of each label on an answer: its reward, its length in tokens without the
            end-of-turn token, whether the label prefers it, and a text that is the same for the same prompt.
        pairs: [P, 2] by key of RULES, the scores of the better and the worse answer; NaN for the mean log-probability
            of an empty one.
        pair_lengths, pair_prompts: [P, 2] and [P] of the pairs.
    """

    rewards: np.ndarray
    lengths: np.ndarray
    is_good: np.ndarray
    prompts: list[str]
    pairs: Mapping[str, np.ndarray]
    pair_lengths: np.ndarray
    pair_prompts: list[str]


def gather(
    answers: Sequence[Sequence[Encoded]],
    labels: Sequence[Sequence[Label]],
    judged: Sequence[Judged],
    prompts: Sequence[str],
    head: str,
) -> Judgements:
    """Return the judgements of one head from records: their answers, labels, results and prompts.

    Labels for other heads are left out. Raises UserError if none is left.
    """
    rewards, lengths, is_good, own_prompts = [], [], [], []
    pairs: dict[str, list[list[float]]] = {rule: [] for rule in RULES}
    pair_lengths, pair_prompts = [], []
    for group, group_labels, result, prompt in zip(answers, labels, judged, prompts, strict=True):
        values = {
            "reward": result.rewards[head],
            "sum": result.logprobs,
            "mean": [np.nan if mean is None else mean for mean in result.mean_logprobs],
        }
        sizes = [sum(answer.score_mask) for answer in group]
        for label in group_labels:
            if label.head not in (None, head):
                continue
            for index, good in ((label.better, True), (label.worse, False)):
                if index is not None:
                    rewards.append(values["reward"][index])
                    lengths.append(sizes[index])
                    is_good.append(good)
                    own_prompts.append(prompt)
            if label.is_pair:
                for rule, scores in values.items():
                    pairs[rule].append([scores[label.better], scores[label.worse]])
                pair_lengths.append([sizes[label.better], sizes[label.worse]])
                pair_prompts.append(prompt)
    if not rewards:
        raise UserError(f"head {head}: expected held-out labels for it, got none")
    return Judgements(
        np.array(rewards), np.array(lengths), np.array(is_good), own_prompts,
        {rule: np.array(values, dtype=float).reshape(-1, 2) for rule, values in pairs.items()},
        np.array(pair_lengths).reshape(-1, 2), pair_prompts,
    )  # fmt: skip


def card(
    head: str,
    about: Mapping[str, Any],
    judgements: Judgements,
    candidates: Mapping[str, Sequence[Scored]],
    normalise: Normalise = best_of.words,
) -> dict[str, Any]:
    """Return the card of a head.

    Args:
        head: its name.
        about: the record of its training, as in its file.
        judgements: on held-out answers.
        candidates: by set, of each prompt the candidates with the scores "reward" and others.
        normalise: see :func:`best_of.curves`; votes weigh a candidate by the calibrated probability of its reward.

    Figures for which there are too few prompts are None, and ``notes`` says why.
    """
    notes: list[str] = []
    found: dict[str, Any] = {
        "head": head,
        "trained": dict(about),
        "answers": len(judgements.rewards),
        "pairs": len(judgements.pair_prompts),
        "prompts": len(set(judgements.prompts)),
        "preferences": _preferences(judgements),
        "agreement": _agreement(judgements),
        "calibration": None,
        "label_noise": None,
        "length": _length(judgements),
        "rewards": {
            name: dict(zip(map(str, QUANTILES), map(float, np.quantile(values, QUANTILES)), strict=True))
            for name, values in (
                ("good", judgements.rewards[judgements.is_good]),
                ("bad", judgements.rewards[~judgements.is_good]),
            )
            if len(values)
        },
        "candidates": {},
    }
    for name, figure in (("calibration", _calibration), ("label_noise", _label_noise)):
        try:
            found[name] = figure(judgements)
        except UserError as error:
            notes.append(str(error))
    fitted = calibration.UNCALIBRATED
    if found["calibration"] is not None:
        fitted = calibration.Calibration(*(found["calibration"][name] for name in fitted._fields))
    for name, prompts in candidates.items():
        curves = best_of.curves(prompts, normalise, {"reward": fitted.probability})
        found["candidates"][name] = [asdict(curve) for curve in curves]
    return {**found, "notes": notes}


def _preferences(judgements: Judgements) -> list[dict[str, Any]]:
    """Return how often each score prefers the better answer of a pair."""
    rows = []
    for rule, title in RULES.items():
        scores = judgements.pairs[rule]
        kept = np.flatnonzero(~np.isnan(scores).any(1))
        prompts = [judgements.pair_prompts[i] for i in kept]
        rows.append(asdict(prefer(title, *scores[kept].T, prompts)))
    return rows


def _agreement(judgements: Judgements) -> dict[str, dict[str, Any]]:
    """Return the share of pairs in which the reward prefers the answer that each log-probability prefers."""
    found = {}
    for rule in ("sum", "mean"):
        both = np.flatnonzero(~np.isnan(judgements.pairs[rule]).any(1))
        if len(both):
            shares = [chosen_shares(judgements.pairs[name][both])[:, 0] for name in ("reward", rule)]
            same = shares[0] * shares[1] + (1 - shares[0]) * (1 - shares[1])
            found[RULES[rule]] = asdict(wilson_of_groups(same, [judgements.pair_prompts[i] for i in both]))
    return found


def _calibration(judgements: Judgements) -> dict[str, Any]:
    """Return the calibration by all answers, and the errors before it and of those that halves of the prompts give."""
    rewards, is_good = judgements.rewards, judgements.is_good
    probabilities = {
        "before": calibration.UNCALIBRATED.probability(rewards),
        "after": calibration.crossed(rewards, is_good, judgements.prompts),
    }
    fitted = calibration.fit(rewards, is_good)
    found: dict[str, Any] = {"temperature": fitted.temperature, "midpoint": fitted.midpoint}
    for name, values in probabilities.items():
        errors = calibration.errors(values, is_good)
        points = [{**one._asdict(), "good": asdict(one.good)} for one in errors.bins]
        found[name] = {**errors._asdict(), "bins": points}
    return found


def _label_noise(judgements: Judgements) -> dict[str, float] | None:
    """Return the share of pairs whose sides are exchanged; None without pairs."""
    if not judgements.pair_prompts:
        return None
    margins = np.subtract(*judgements.pairs["reward"].T)
    return asdict(calibration.label_noise(margins, judgements.pair_prompts))


def _length(judgements: Judgements) -> dict[str, Any]:
    """Return correlations of reward and length, and the accuracy in bins of the pairs' difference of lengths."""
    from scipy import stats

    found: dict[str, Any] = {"pearson": None, "spearman": None, "bins": []}
    if np.ptp(judgements.rewards) > 0 and np.ptp(judgements.lengths) > 0:
        found["pearson"] = float(stats.pearsonr(judgements.rewards, judgements.lengths).statistic)
        found["spearman"] = float(stats.spearmanr(judgements.rewards, judgements.lengths).statistic)
    if not judgements.pair_prompts:
        return found
    differences = np.subtract(*judgements.pair_lengths.T)
    right = chosen_shares(judgements.pairs["reward"])[:, 0]
    edges = np.unique(np.quantile(differences, np.linspace(0, 1, LENGTH_BINS + 1)))
    numbers = np.clip(np.searchsorted(edges, differences, side="right") - 1, 0, max(len(edges) - 2, 0))
    for number in np.unique(numbers):
        own = np.flatnonzero(numbers == number)
        accuracy = wilson_of_groups(right[own], [judgements.pair_prompts[i] for i in own])
        found["bins"].append(
            {
                "shortest": int(differences[own].min()),
                "longest": int(differences[own].max()),
                "n": len(own),
                "accuracy": asdict(accuracy),
            }
        )
    return found


def markdown(card: Mapping[str, Any], figure: str | None = None) -> str:
    """Return a card as Markdown; ``figure`` is the name of its picture."""
    trained = card["trained"]
    lines = [
        f"# Reward head {card['head']}",
        "",
        f"{card['pairs']:,} held-out pairs ({card['answers']:,} labelled answers) of {card['prompts']:,} prompts. "
        "Intervals are at 95%.",
        "",
    ]
    known = {
        "backbone": trained.get("backbone"), "layer": trained.get("layer"), "pooler": trained.get("pooler"),
        "stage": trained.get("stage"), "sources": ", ".join(map(str, trained.get("sources") or ())),
        "training pairs": trained.get("pairs"), "steps": trained.get("steps"), "held-out data": trained.get("held_out"),
    }  # fmt: skip
    lines += [markdown_table(["", ""], [[key, value] for key, value in known.items() if value not in (None, "")]), ""]
    if figure is not None:
        lines += [f"![calibration, rewards, length and candidates]({figure})", ""]
    lines += ["## Preferences", ""]
    rows = []
    for row in card["preferences"]:
        agrees = card["agreement"].get(row["method"])
        rows.append(
            [row["method"], *_interval(row["accuracy"]), row["margin"], row["ties"], row["n"], *_interval(agrees)[:1]]
        )
    headers = ["score", "pair accuracy", "interval", "mean margin", "ties", "pairs", "agreement with the reward"]
    lines += [markdown_table(headers, rows), ""]
    if card["label_noise"] is not None:
        value, interval = _interval(card["label_noise"])
        lines += [f"Label noise ε, as far as large margins show it: {value:.3f} ({interval}).", ""]
    if card["calibration"] is not None:
        lines += _calibration_lines(card["calibration"])
    lines += ["## Rewards", ""]
    quantiles = [[name, *values.values()] for name, values in card["rewards"].items()]
    lines += [markdown_table(["answers", *(f"{float(q):.0%}" for q in QUANTILES)], quantiles), ""]
    lines += ["## Length", ""]
    if card["length"]["spearman"] is not None:
        pearson, spearman = card["length"]["pearson"], card["length"]["spearman"]
        lines += [f"Correlation of reward and length: Pearson {pearson:.3f}, Spearman {spearman:.3f}.", ""]
    if card["length"]["bins"]:
        rows = []
        for one in card["length"]["bins"]:
            rows.append([f"{one['shortest']:+d} to {one['longest']:+d}", one["n"], *_interval(one["accuracy"])])
        lines += [markdown_table(["better answer longer by, in tokens", "pairs", "accuracy", "interval"], rows), ""]
    for name, curves in card["candidates"].items():
        lines += [f"## Best of N: {name}", ""]
        ns = curves[0]["ns"]
        rows = []
        for curve in curves:
            rows.append([curve["rule"], *(right["value"] for right in curve["right"]), curve["enough"]])
        lines += [markdown_table(["right, chosen by", *(f"N = {n}" for n in ns), "enough at N"], rows), ""]
        lines += [
            f"{curves[0]['prompts']:,} prompts. No N larger than the last column is better beyond its interval.",
            "",
        ]
    lines += [f"Note: {note}.\n" for note in card["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _calibration_lines(figures: Mapping[str, Any]) -> list[str]:
    rows = []
    for name in ("before", "after"):
        rows.append([name, *(figures[name][key] for key in ("ece", "ece_by_chance", "brier"))])
    shift = f"{-figures['midpoint']:+.4g}"
    return [
        "## Calibration",
        "",
        f"An answer is good with probability sigmoid((reward {shift[0]} {shift[1:]}) / "
        f"{figures['temperature']:.4g}) (`model.probability`). Before: sigmoid(reward). After: each half of the "
        "prompts by the fit of the other half.",
        "",
        markdown_table(["calibration", "expected calibration error", "by chance alone", "Brier score"], rows),
        "",
    ]


def _interval(figure: Mapping[str, float] | None) -> list[Any]:
    """Return a figure and its interval as cells."""
    if figure is None:
        return [None, None]
    return [figure["value"], f"{figure['low']:.3f} to {figure['high']:.3f}"]
