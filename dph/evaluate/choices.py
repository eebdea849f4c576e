"""Evaluation of answers by log-probability and by reward, both read in one packed forward pass.

All alternatives of a record are scored together, their shared beginning computed once. A record with a NaN among its
scores counts as answered wrongly and is counted in ``nans``; one whose best score is shared is counted in ``ties``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dph import chat
from dph.errors import UserError
from dph.evaluate.metrics import METRICS, Interval, Metric, bootstrap, wilson

if TYPE_CHECKING:
    from dph.model.model import Model
    from dph.tasks import Task


@dataclass(frozen=True)
class Row:
    """Figures of one method of choosing, the number of ties and the number of records with a NaN."""

    method: str
    metrics: dict[str, Interval]
    ties: int
    nans: int


@dataclass(frozen=True)
class Report:
    """Result of one task: ``n`` records, and a row for each method of choosing."""

    task: str
    n: int
    rows: tuple[Row, ...]

    @property
    def nans(self) -> int:
        """Records with a NaN, summed over all rows."""
        return sum(row.nans for row in self.rows)

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
    """
    heads = [head] if isinstance(head, str) else list(head or ())
    if heads:
        model.check_heads(*heads)
    if task.metric is None:
        raise UserError(f"task {task.name}: expected one with choices to score, got one that is answered freely")
    references: list[float] = []
    judged = model.judge(_encoded_choices(task, docs, tokenizer, references), max_tokens)
    if not judged:
        raise UserError(f"task {task.name}: expected at least one record, got none")
    gold, metrics = np.array(references), METRICS[task.metric]
    rows = [_row("log-probability", [record.mean_logprobs for record in judged], gold, metrics)]
    for name in heads:
        method = "reward" if len(heads) == 1 else f"reward {name}"
        rows.append(_row(method, [record.rewards[name] for record in judged], gold, metrics))
    return Report(task.name, len(gold), tuple(rows))


def _encoded_choices(
    task: Task, docs: Iterable[Mapping[str, Any]], tokenizer: Any, references: list[float]
) -> Iterator[list[chat.Encoded]]:
    """Yield the encoded choices of each record; its reference is appended to ``references``."""
    for i, doc in enumerate(docs):
        try:
            choices, reference = task.labelled(doc)
        except UserError as error:
            raise UserError(f"record {i}: {error}") from error
        if reference is None:
            raise UserError(
                f"task {task.name}, record {i}: expected a label, got none; this split's answers are hidden"
            )
        references.append(reference)
        yield [chat.encode(choice, tokenizer, last_only=True) for choice in choices]


def _row(method: str, scores: Sequence[Sequence[float]], gold: np.ndarray, metrics: Sequence[Metric]) -> Row:
    """Figures of the choices by ``scores``: for each record a score for each of its choices."""
    predicted, ties, nans = np.empty(len(gold), dtype=int), 0, 0
    for i, choices in enumerate(scores):
        predicted[i] = choose(choices, gold[i])
        if any(map(math.isnan, choices)):
            nans += 1
        elif list(choices).count(max(choices)) > 1:
            ties += 1
    return Row(method, {metric.__name__: bootstrap(metric, predicted, gold) for metric in metrics}, ties, nans)


def choose(scores: Sequence[float], gold: float) -> int:
    """Return the index of the best score, the first of equals; with a NaN among them the one farthest from ``gold``."""
    if not any(map(math.isnan, scores)):
        return max(range(len(scores)), key=scores.__getitem__)
    return max(range(len(scores)), key=lambda i: abs(i - gold)) if len(scores) > 1 else -1


@dataclass(frozen=True)
class PairRow:
    """Agreement of one score with the preferences.

    Attributes:
        accuracy: share of the pairs whose chosen answer has the higher score, a tie counting half, with Wilson's
            interval; None without pairs.
        margin: mean difference of the two scores without NaNs; None if there is none.
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
    valid = margins[~np.isnan(margins)]
    ties = int(np.sum(valid == 0))
    accuracy = wilson(float(np.sum(valid > 0)) + ties / 2, len(margins)) if len(margins) else None
    margin = float(valid.mean()) if len(valid) else None
    return PairRow(method, accuracy, margin, ties, nans=len(margins) - len(valid), n=len(margins))
