"""Suites of tasks and the averages of the paper's tables 1 to 3.

| suite | tasks | averages |
|---|---|---|
| glue | those of the GLUE score, MNLI as two | with and without WNLI |
| gpt4all | HellaSwag, OpenBookQA, WinoGrande, ARC-C, ARC-E, BoolQ, PIQA | plain |
| race | middle and high school | plain, and weighted by the questions of the test split |
| mmlu | all subjects | - |
| all | all of these | all of these |

In the GLUE score MRPC and QQP count with the mean of F1 and accuracy, STS-B with that of both correlations, MNLI with
that of its matched and mismatched questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dph.evaluate.choices import Report, Row
from dph.evaluate.metrics import Interval

GLUE = (
    ("glue/cola",), ("glue/sst2",), ("glue/mrpc",), ("glue/qqp",), ("glue/stsb",),
    ("glue/mnli_matched", "glue/mnli_mismatched"), ("glue/qnli",), ("glue/rte",),
)  # fmt: skip
GPT4ALL = (
    "hellaswag/no_choice", "openbookqa/main", "winogrande/no_choice", "arc/challenge", "arc/easy", "boolq", "piqa",
)  # fmt: skip
RACE = {"race/middle": 1436, "race/high": 3498}


@dataclass(frozen=True)
class Average:
    """A weighted mean over groups of tasks; a group counts with the plain mean of its tasks."""

    name: str
    groups: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...]

    @property
    def tasks(self) -> list[str]:
        """All tasks that it needs."""
        return [task for group in self.groups for task in group]


def _plain(name: str, groups: Sequence[tuple[str, ...]]) -> Average:
    return Average(name, tuple(groups), (1 / len(groups),) * len(groups))


@dataclass(frozen=True)
class Suite:
    """Tasks, and the averages over them."""

    tasks: tuple[str, ...]
    averages: tuple[Average, ...]


_single = tuple((task,) for task in GPT4ALL)
SUITES = {
    "glue": Suite(
        (*(task for group in GLUE for task in group), "glue/wnli"),
        (_plain("GLUE", (*GLUE, ("glue/wnli",))), _plain("GLUE without WNLI", GLUE)),
    ),
    "gpt4all": Suite(GPT4ALL, (_plain("GPT4All", _single),)),
    "race": Suite(
        tuple(RACE),
        (
            _plain("RACE", tuple((task,) for task in RACE)),
            Average(
                "RACE, weighted", tuple((task,) for task in RACE), tuple(n / sum(RACE.values()) for n in RACE.values())
            ),
        ),
    ),
    "mmlu": Suite(("mmlu/all",), ()),
}
SUITES["all"] = Suite(
    tuple(task for suite in SUITES.values() for task in suite.tasks),
    tuple(average for suite in SUITES.values() for average in suite.averages),
)


def task_figure(row: Row) -> Interval | None:
    """Return the figure of a task in an average: the mean of its metrics, with the mean of their half widths."""
    figures = list(row.metrics.values())
    if None in figures:
        return None
    return _combined(figures, [1 / len(figures)] * len(figures), independent=False)


def averages(reports: Sequence[Report], wanted: Sequence[Average]) -> list[tuple[str, str, Interval]]:
    """Return (average, method, figure) of each average all of whose tasks are among the reports.

    The tasks are independent samples: the half width of the interval is the square root of the weighted half widths'
    sum of squares.
    """
    rows: dict[str, dict[str, Row]] = {report.task: {row.method: row for row in report.rows} for report in reports}
    found = []
    for average in wanted:
        if any(task not in rows for task in average.tasks):
            continue
        for method in rows[average.tasks[0]]:
            figures, weights = [], []
            for group, weight in zip(average.groups, average.weights, strict=True):
                for task in group:
                    figures.append(task_figure(rows[task][method]) if method in rows[task] else None)
                    weights.append(weight / len(group))
            if None not in figures:
                found.append((average.name, method, _combined(figures, weights, independent=True)))
    return found


def missing(reports: Sequence[Report], wanted: Sequence[Average]) -> Mapping[str, list[str]]:
    """Return, for each average that lacks some, the tasks of which the reports have no records with labels."""
    present = {report.task for report in reports if report.labels}
    lacks = {average.name: [task for task in average.tasks if task not in present] for average in wanted}
    return {name: tasks for name, tasks in lacks.items() if tasks}


def _combined(figures: Sequence[Interval], weights: Sequence[float], *, independent: bool) -> Interval:
    """Return the weighted mean of figures; its half widths are those of independent figures, or of one sample."""

    def width(widths: Sequence[float]) -> float:
        parts = [weight * value for weight, value in zip(weights, widths, strict=True)]
        return math.hypot(*parts) if independent else sum(parts)

    value = sum(weight * figure.value for weight, figure in zip(weights, figures, strict=True))
    low = width([figure.value - figure.low for figure in figures])
    return Interval(value, value - low, value + width([figure.high - figure.value for figure in figures]))
