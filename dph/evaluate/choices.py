"""Evaluation of answers by log-probability and by reward, both read in one packed forward pass.

All alternatives of a record are scored together, their shared beginning computed once. An empty answer has no mean
log-probability: its record is left out of what is chosen by that score. Scores that are no finite numbers are an error.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from dph import chat
from dph.errors import UserError
from dph.evaluate.metrics import METRICS, Interval, Metric, check_finite, chosen_shares, wilson_of_groups, with_interval

if TYPE_CHECKING:
    from dph.model.judging import Judged
    from dph.model.model import Model
    from dph.tasks import Task

Scores = dict[str, list[float | None]]
"""Method of choosing -> a score for each choice of a record; None for the mean of an empty answer."""


# Mean over the content's tokens; sum, the end-of-turn token included; and this sum per byte of the answer in UTF-8.
LOGPROBS = {
    "mean": "log-probability",
    "sum": "log-probability (sum)",
    "bytes": "log-probability (per byte)",
}


@dataclass(frozen=True)
class Row:
    """Figures of one method of choosing among ``n`` records; in ``ties`` of them several choices share the best score.

    ``metrics`` has None if no record could be compared: without labels, or by the mean of empty answers.
    """

    method: str
    metrics: dict[str, Interval | None]
    ties: int
    n: int


@dataclass(frozen=True)
class Report:
    """Result of one task: ``n`` records, ``labels`` of them with a reference, and a row for each method of choosing."""

    task: str
    n: int
    labels: int
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain dictionaries for JSON."""
        return asdict(self)


def evaluate(
    model: Model,
    tokenizer: Any,
    task: Task,
    docs: Iterable[Mapping[str, Any]],
    *,
    head: str | Sequence[str] | None = "default",
    max_tokens: int = 16_384,
) -> Report:
    """Score all choices of every record and report the task's metric.

    Args:
        docs: records of ``task``, for instance ``dph.data.dataset.task_documents(task, "validation")``.
        head: reward head, or several that are evaluated in the same pass (rows "reward NAME"); None, or an empty
            list, evaluates by log-probability only.
        max_tokens: upper bound on the tokens of a packed batch.

    Raises:
        ValueError: the head is missing or untrained.
        UserError: the task has no choices, a record has no reference, or there are no records.
        RuntimeError: a score is NaN or infinite.
    """
    heads = [head] if isinstance(head, str) else list(head or ())
    if heads:
        model.check_heads(*heads)
    docs = docs if isinstance(docs, Sequence) else list(docs)
    gold = references(task, docs)
    for i, reference in enumerate(gold):
        if reference is None:
            raise UserError(
                f"task {task.name}, record {i}: expected a label, got none; this split's answers are hidden (dph "
                "evaluate writes predictions)"
            )
    judged = chain.from_iterable(model.judge_batches(encoded_choices(task, docs, tokenizer), max_tokens))
    scores = [choice_scores(record, heads, f"record {i}") for i, record in enumerate(judged)]
    return report(task, scores, gold)


def references(
    task: Task, docs: Sequence[Mapping[str, Any]], place: Callable[[int], str] = "record {}".format
) -> list[float | None]:
    """Check all records and return their references: indices of the right choices, or scores; None if hidden.

    ``place`` returns the name of a record, given its index, for errors. Raises UserError if the task has no choices,
    for a malformed record, and if there are no records.
    """
    if task.metric is None:
        raise UserError(f"task {task.name}: expected one with choices to score, got one that is answered freely")
    gold = []
    for i, doc in enumerate(docs):
        try:
            gold.append(task.check(doc))
        except UserError as error:
            raise UserError(f"{place(i)}: {error}") from error
    if not gold:
        raise UserError(f"task {task.name}: expected at least one record, got none")
    return gold


def encoded_choices(task: Task, docs: Iterable[Mapping[str, Any]], tokenizer: Any) -> Iterator[list[chat.Encoded]]:
    """Yield the encoded choices of each record."""
    for doc in docs:
        yield [chat.encode(choice, tokenizer, last_only=True) for choice in task.choices(doc)]


def choice_scores(
    judged: Judged,
    heads: Sequence[str],
    where: str,
    logprobs: Sequence[str] = ("mean",),
    answers: Sequence[str] | None = None,
) -> Scores:
    """Return the scores of the choices of one record.

    Args:
        judged: their results.
        heads: reward heads that choose.
        where: beginning of errors.
        logprobs: keys of LOGPROBS that choose.
        answers: texts of the choices, for "bytes".

    Raises RuntimeError if a score is not finite.
    """
    scores: Scores = {}
    for name in logprobs:
        values: list[float | None] = judged.mean_logprobs if name == "mean" else list(judged.logprobs)
        if name == "bytes":
            sizes = [len(answer.encode()) for answer in answers]
            values = [value / size if size else None for value, size in zip(values, sizes, strict=True)]
        scores[LOGPROBS[name]] = values
    for name in heads:
        scores[reward_method(name, heads)] = judged.rewards[name]
    for method, values in scores.items():
        check_finite([value for value in values if value is not None], f"{where}: {method}")
    return scores


def reward_method(head: str, heads: Sequence[str]) -> str:
    """Return the name of choosing by the reward of one of ``heads``."""
    return "reward" if len(heads) == 1 else f"reward {head}"


def predictions(answers: Sequence[str], scores: Scores) -> dict[str, dict[str, Any] | None]:
    """Return by each method the index of the chosen answer, the first of those with the best score, and its text.

    None for the mean of an empty answer, which cannot be compared.
    """
    chosen: dict[str, dict[str, Any] | None] = {}
    for method, values in scores.items():
        chosen[method] = None
        if None not in values:
            best = values.index(max(values))
            chosen[method] = {"choice": best, "text": answers[best]}
    return chosen


def report(task: Task, scores: Sequence[Scores], gold: Sequence[float | None]) -> Report:
    """Return the figures of a task by each method of choosing, of the records with a reference."""
    rows = []
    labelled = [i for i, reference in enumerate(gold) if reference is not None]
    for method in scores[0]:
        complete = [i for i in labelled if None not in scores[i][method]]
        values = [scores[i][method] for i in complete]
        rows.append(_row(method, values, np.array([gold[i] for i in complete]), METRICS[task.metric]))
    return Report(task.name, len(gold), len(labelled), tuple(rows))


def _row(method: str, scores: Sequence[Sequence[float]], gold: np.ndarray, metrics: Sequence[Metric]) -> Row:
    """Figures of the choices by ``scores``: for each record a score for each of its choices."""
    shares = chosen_shares(scores)
    figures = {metric.__name__: with_interval(metric, shares, gold) if len(gold) else None for metric in metrics}
    return Row(method, figures, count_ties(shares), len(gold))


def count_ties(shares: np.ndarray) -> int:
    """Return the number of records in which several choices share the best score."""
    return int(np.sum((shares > 0).sum(1) > 1))


@dataclass(frozen=True)
class PairRow:
    """Agreement of one score with the preferences.

    Attributes:
        accuracy: share of the pairs whose chosen answer has the higher score, a tie counting half, with Wilson's
            interval (of several pairs of a prompt, see ``metrics.wilson_of_groups``); None without pairs.
        margin: mean difference of the two scores; None without pairs.
        ties: pairs with equal scores.
        n: pairs that could be compared.
    """

    method: str
    accuracy: Interval | None
    margin: float | None
    ties: int
    n: int


def prefer(
    method: str,
    chosen: Sequence[float | None],
    rejected: Sequence[float | None],
    prompts: Sequence[Hashable] | None = None,
) -> PairRow:
    """Compare the scores [n] of chosen and rejected answers; a pair without one of them (None) is left out.

    ``prompts`` [n] are equal for pairs of the same prompt; None if each pair has its own. Raises RuntimeError if a
    score is NaN or infinite.
    """
    scores = list(zip(chosen, rejected, strict=True))
    kept = [i for i, pair in enumerate(scores) if None not in pair]
    if not kept:
        return PairRow(method, None, None, 0, 0)
    pairs = [scores[i] for i in kept]
    shares = chosen_shares(pairs, lambda i: f"{method}: pair {i}")
    margin = float(np.subtract(*np.array(pairs, dtype=float).T).mean())
    accuracy = wilson_of_groups(shares[:, 0], kept if prompts is None else [prompts[i] for i in kept])
    return PairRow(method, accuracy, margin, count_ties(shares), len(pairs))
