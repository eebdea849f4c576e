"""Accuracy of choosing among N samples, by rule and by N, as a table and as figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dph import chat
from dph.data.atomic import atomic_file
from dph.demo.puzzles import Puzzle
from dph.evaluate.metrics import Interval, chosen_shares, wilson
from dph.evaluate.tables import table
from dph.infer.best_of_n import Choice, ranked, sample
from dph.infer.request import Answer
from dph.model.model import Model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (1, 2, 4, 8, 16)  # values of N in the figures
TABLE_SIZES = (8, 16)  # values of N in the table
SAMPLE, PROBABLE, REWARD, ORACLE = RULES = ("one sample", "most probable of N", "best of N by reward", "oracle of N")
ANSWER_TOKENS = 8
SHOWN = 3  # prompts printed with all their candidates


@dataclass(frozen=True)
class SampledAnswers:
    """Candidates of one model for P prompts.

    Attributes:
        puzzles: of the prompts.
        groups: the candidates of each prompt, in the order of sampling.
        correct: [P, N] whether each candidate is right.
    """

    puzzles: list[Puzzle]
    groups: list[list[Answer]]
    correct: np.ndarray


def sample_answers(model: Model, tokenizer: Any, puzzles: Sequence[Puzzle], n: int, seed: int) -> list[list[Answer]]:
    """Return the ``n`` sampled answers of each puzzle."""
    prompts = [chat.prompt(puzzle.question(), tokenizer) for puzzle in puzzles]
    return sample(model, tokenizer, prompts, n, max_new_tokens=ANSWER_TOKENS, seed=seed)


def answer_text(answer: Answer, tokenizer: Any) -> str:
    """Return the content of an answer."""
    return tokenizer.decode(answer.tokens[: len(answer.tokens) - answer.finished], skip_special_tokens=False)


def sample_and_check(model: Model, tokenizer: Any, puzzles: list[Puzzle], seed: int) -> SampledAnswers:
    """Sample the candidates of every puzzle, with the model's rewards, and check them."""
    groups = sample_answers(model, tokenizer, puzzles, SIZES[-1], seed)
    correct = np.zeros((len(puzzles), SIZES[-1]), dtype=bool)
    for i, (puzzle, group) in enumerate(zip(puzzles, groups, strict=True)):
        for j, answer in enumerate(group):
            correct[i, j] = answer.finished and puzzle.check(answer_text(answer, tokenizer))
    return SampledAnswers(puzzles, groups, correct)


def correctness(samples: SampledAnswers, rule: str, n: int) -> np.ndarray:
    """Return [P] the share of right answers (0 or 1) that ``rule`` gives when it chooses among ``n`` candidates.

    The rule of one sample chooses nothing: it gives the mean over all candidates for every ``n``.
    """
    correct = samples.correct[:, :n]
    if rule == SAMPLE:
        return samples.correct.mean(1)
    if rule == ORACLE:
        return correct.any(1).astype(float)
    values = np.zeros(len(correct))
    for i, group in enumerate(samples.groups):
        finished = [j for j, answer in enumerate(group[:n]) if answer.finished]
        if finished:  # an answer that was cut off is never chosen, and none of them is right
            scores = [group[j].rewards["default"] if rule == REWARD else group[j].logprob for j in finished]
            shares = chosen_shares([scores])
            values[i] = shares[0] @ correct[i, finished]
    return values


def accuracy(samples: SampledAnswers, rule: str, n: int) -> Interval:
    """Return the share of prompts that ``rule`` answers right, with Wilson's 95% interval over prompts."""
    values = correctness(samples, rule, n)
    return wilson(float(values.sum()), len(values))


def has_rule(name: str, rule: str) -> bool:
    """Return whether ``rule`` applies to the model ``name``: the SFT model has no reward head."""
    return not (name == "SFT" and rule == REWARD)


def report(results: Mapping[str, SampledAnswers], tokenizer: Any) -> str:
    """Return the accuracies of all models as a table, and some prompts with all candidates ranked by reward."""
    headers = ["model", "choice"]
    for n in TABLE_SIZES:
        headers += [f"N = {n}", "95% interval"]
    rows = []
    for name, samples in results.items():
        for rule in RULES:
            cells = []
            for n in TABLE_SIZES:
                if has_rule(name, rule):
                    interval = accuracy(samples, rule, n)
                    cells += [interval.value, interval.range]
                else:
                    cells += [None, None]
            rows.append([name, rule, *cells])
    name, samples = list(results.items())[-1]
    prompts = len(samples.puzzles)
    lines = [f"\nAccuracy on {prompts} held-out prompts\n", table(headers, rows)]
    for i in range(min(SHOWN, prompts)):
        lines += ["", f"{samples.puzzles[i].prompt}   (the {name} model's candidates)"]
        lines.append(_candidate_table(samples.puzzles[i], samples.groups[i], tokenizer))
    return "\n".join(lines)


def _candidate_table(puzzle: Puzzle, group: Sequence[Answer], tokenizer: Any) -> str:
    prompt = chat.prompt(puzzle.question(), tokenizer)
    rows = []
    for candidate in ranked(prompt, group, tokenizer, Choice()):
        reward = candidate.reward if candidate.finished else None
        right = "yes" if puzzle.check(candidate.text) else ""
        rows.append([reward, candidate.logprob, candidate.text, right])
    return table(["reward", "log-probability", "answer", "right"], rows)


def save_figures(results: Mapping[str, SampledAnswers], directory: Path) -> list[Path]:
    """Draw accuracy over N, and the rewards of right and wrong answers, into PNG files in ``directory``."""
    figures = {"accuracy.png": _curves(results), "rewards.png": _histograms(results)}
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        with atomic_file(directory / name) as file:
            figure.savefig(file, dpi=120, format="png")
    return [directory / name for name in figures]


def _curves(results: Mapping[str, SampledAnswers]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(results), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (name, samples) in zip(panels, results.items(), strict=True):
        for colour, rule in enumerate(RULES):
            if has_rule(name, rule):
                points = [accuracy(samples, rule, n) for n in SIZES]
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


def _histograms(results: Mapping[str, SampledAnswers]) -> Figure:
    from matplotlib.figure import Figure

    with_head = {name: samples for name, samples in results.items() if has_rule(name, REWARD)}
    figure = Figure(figsize=(5.2 * len(with_head), 3.6), layout="constrained")
    panels = figure.subplots(1, len(with_head), squeeze=False)[0]
    for axes, (name, samples) in zip(panels, with_head.items(), strict=True):
        rewards = np.array([[a.rewards.get("default", np.nan) for a in group] for group in samples.groups])
        rewarded = ~np.isnan(rewards)
        bins = np.histogram_bin_edges(rewards[rewarded], bins=40)
        for label, selected in (("right answers", samples.correct), ("wrong answers", ~samples.correct)):
            axes.hist(rewards[selected & rewarded], bins=bins, alpha=0.6, label=label)
        axes.set(title=name, xlabel="reward", ylabel="candidates")
        axes.legend(fontsize=8)
    return figure
