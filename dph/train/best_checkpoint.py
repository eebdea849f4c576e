"""Selection of the best checkpoint by one metric on held-out records (``output.best``)."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from dph.errors import UserError

LOWER_IS_BETTER = ("loss", "entropy")
"""Metrics to minimise; all others are accuracies."""


def check_metric(metric: str | None, available: Collection[str]) -> None:
    """Raise UserError unless ``metric`` is None or one of the ``available`` ones, those of an evaluation."""
    if metric is None or metric in available:
        return
    if not available:
        raise UserError(f"output.best: expected evaluation.sources to judge {metric} by, got none")
    raise UserError(f"output.best: expected one of {', '.join(available)}, got {metric!r}")


class BestCheckpoint:
    """The best step so far.

    Attributes:
        metric: name of the deciding metric, ``METRIC`` or ``METRIC/SOURCE``; None switches the selection off.
        state: ``step``, ``figure`` (the metric's name) and ``value`` of the best step, as saved; None before the first.
    """

    def __init__(self, metric: str | None) -> None:
        self.metric = metric
        self.state: dict[str, Any] | None = None

    def __str__(self) -> str:
        """Return a description for the user."""
        return "no best one" if self.state is None else f"the best by {self.metric} ({self.state['value']:.4g})"

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Record ``step`` if it is better than all before, and return whether it is; ties and NaN are not."""
        value = math.nan if self.metric is None else metrics.get(self.metric, math.nan)
        if math.isnan(value):  # also of no record that has a label for the metric
            return False
        if self.state is not None:
            lower_is_better = self.metric.partition("/")[0] in LOWER_IS_BETTER
            improved = value < self.state["value"] if lower_is_better else value > self.state["value"]
            if not improved:
                return False
        self.state = {"step": step, "figure": self.metric, "value": value}
        return True

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Restore ``state`` from a checkpoint, unless another metric decided it."""
        same_metric = state is not None and state["figure"] == self.metric
        self.state = dict(state) if same_metric else None
