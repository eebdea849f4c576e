"""What choosing among N samples is worth: accuracy by rule and by N, as a table and as figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dph import chat
from dph.chat import Encoded
from dph.demo.puzzles import Puzzle
from dph.evaluate.choices import Interval, bootstrap
from dph.evaluate.tables import table
from dph.infer.best_of_n import rank, sample
from dph.model.model import Judged, Model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (1, 2, 4, 8, 16)  # of N
TABLE = (8, 16)  # those that the table shows
SAMPLE, PROBABLE, REWARD, ORACLE = RULES = ("one sample", "most probable of N", "best of N by reward", "oracle of N")
ANSWER_TOKENS = 8
PROMPTS = 250  # sampled at once
SHOWN = 3  # prompts with all their candidates


@dataclass(frozen=True)
class Outcome:
    """The candidates of one model for P prompts.

    Attributes:
        asked: the puzzles.
        groups: for each its candidates, in the order of sampling.
        judged: their log-probabilities and rewards.
        right: [P, N] whether each candidate is right.
    """

    asked: list[Puzzle]
    groups: list[list[Encoded]]
    judged: list[Judged]
    right: np.ndarray


def answers(model: Model, tokenizer: Any, asked: Sequence[Puzzle], n: int, seed: int) -> Iterator[list[Encoded]]:
    """``n`` sampled answers to every puzzle."""
    for first in range(0, len(asked), PROMPTS):
        prompts = [chat.prompt(puzzle.question(), tokenizer) for puzzle in asked[first : first + PROMPTS]]
        yield from sample(model, tokenizer, prompts, n, max_new_tokens=ANSWER_TOKENS, seed=seed + first)


def said(answer: Encoded, tokenizer: Any) -> str:
    """The content of an answer."""
    content = [token for token, on in zip(answer.targets, answer.score_mask, strict=True) if on]
    return tokenizer.decode(content, skip_special_tokens=False)


def ask(model: Model, tokenizer: Any, asked: list[Puzzle], seed: int) -> Outcome:
    """Sample and judge the candidates of every puzzle, and check them."""
    groups = list(answers(model, tokenizer, asked, SIZES[-1], seed))
    judged = model.judge(groups)
    right = [
        [e.reward_position is not None and puzzle.check(said(e, tokenizer)) for e in group]
        for puzzle, group in zip(asked, groups, strict=True)
    ]
    return Outcome(asked, groups, judged, np.array(right))


def chosen(outcome: Outcome, rule: str, n: int) -> np.ndarray:
    """[P] how right the rule's choice among the first ``n`` candidates is.

    One sample needs no choice: its figure is the share of right ones among all candidates, whatever ``n`` is.
    """
    right = outcome.right[:, :n]
    if rule == SAMPLE:
        return outcome.right.mean(1)
    if rule == ORACLE:
        return right.any(1).astype(float)
    scores = np.array([(j.rewards["default"] if rule == REWARD else j.logprobs)[:n] for j in outcome.judged])
    finished = np.array([[e.reward_position is not None for e in group[:n]] for group in outcome.groups])
    best = np.where(finished, scores, -np.inf).argmax(1)  # an answer that was cut off is never chosen
    return right[np.arange(len(right)), best].astype(float)


def accuracy(outcome: Outcome, rule: str, n: int) -> Interval:
    """Share of prompts that ``rule`` answers right, with the bootstrap's 95% interval over prompts."""
    values = chosen(outcome, rule, n)
    return bootstrap(lambda picked, _: float(picked.mean()), values, values)


def applies(name: str, rule: str) -> bool:
    """The SFT model has no trained head to choose by."""
    return not (name == "SFT" and rule == REWARD)


def report(found: Mapping[str, Outcome], tokenizer: Any) -> str:
    """The table, and some prompts with all candidates ranked by reward."""
    rows = []
    for name, outcome in found.items():
        for rule in RULES:
            figures = [accuracy(outcome, rule, n) for n in TABLE] if applies(name, rule) else []
            cells = [text for f in figures for text in (f.value, f.range)] or [None] * 2 * len(TABLE)
            rows.append([name, rule, *cells])
    headers = ["model", "choice", *(text for n in TABLE for text in (f"N = {n}", "95% interval"))]
    prompts = len(next(iter(found.values())).asked)
    lines = [f"\nAccuracy on {prompts} held-out prompts\n", table(headers, rows)]
    *_, (name, outcome) = found.items()
    for i in range(min(SHOWN, prompts)):
        lines += [
            "",
            f"{outcome.asked[i].prompt}   (the {name} model's candidates)",
            _candidates(outcome, i, tokenizer),
        ]
    return "\n".join(lines)


def _candidates(outcome: Outcome, i: int, tokenizer: Any) -> str:
    group, puzzle = outcome.groups[i], outcome.asked[i]
    start = len(chat.prompt(puzzle.question(), tokenizer))
    ranked = rank(group, outcome.judged[i], tokenizer, head="default", start=start)
    rows = [
        [c.reward if c.finished else None, c.logprob, c.text, "yes" if puzzle.check(c.text) else ""] for c in ranked
    ]
    return table(["reward", "log-probability", "answer", "right"], rows)


def draw(found: Mapping[str, Outcome], directory: Path) -> list[Path]:
    """Accuracy over N, and the rewards of right and wrong answers, as PNG files in ``directory``."""
    figures = {"accuracy.png": _curves(found), "rewards.png": _histograms(found)}
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(directory / name, dpi=120)
    return [directory / name for name in figures]


def _curves(found: Mapping[str, Outcome]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(found), 4.2), layout="constrained")
    for axes, (name, outcome) in zip(
        figure.subplots(1, len(found), sharey=True, squeeze=False)[0], found.items(), strict=True
    ):
        for colour, rule in enumerate(RULES):
            if applies(name, rule):
                points = [accuracy(outcome, rule, n) for n in SIZES]
                axes.plot(SIZES, [p.value for p in points], f"oC{colour}-", markersize=4, label=rule)
                low, high = [p.low for p in points], [p.high for p in points]
                axes.fill_between(SIZES, low, high, color=f"C{colour}", alpha=0.15)
        axes.set(title=name, xscale="log", xlabel="candidates N", ylim=(0, 1.02))
        axes.set_xticks(SIZES, [str(n) for n in SIZES])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.label_outer()
    figure.axes[0].set_ylabel("accuracy on held-out prompts")
    figure.axes[-1].legend(loc="lower right", fontsize=8)
    return figure


def _histograms(found: Mapping[str, Outcome]) -> Figure:
    from matplotlib.figure import Figure

    judged = {name: outcome for name, outcome in found.items() if applies(name, REWARD)}
    figure = Figure(figsize=(5.2 * len(judged), 3.6), layout="constrained")
    for axes, (name, outcome) in zip(figure.subplots(1, len(judged), squeeze=False)[0], judged.items(), strict=True):
        rewards = np.array([j.rewards["default"] for j in outcome.judged])
        bins = np.linspace(np.nanmin(rewards), np.nanmax(rewards), 41)
        for label, wanted in (("right answers", outcome.right), ("wrong answers", ~outcome.right)):
            axes.hist(rewards[wanted & ~np.isnan(rewards)], bins=bins, alpha=0.6, label=label)
        axes.set(title=name, xlabel="reward", ylabel="candidates")
        axes.legend(fontsize=8)
    return figure
