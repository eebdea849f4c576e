"""Which step's checkpoint is the best, by one figure on held-out records (``output.best``)."""

from collections.abc import Collection, Mapping
from typing import Any

from dph.errors import UserError

LOWER = ("loss", "entropy")  # of these less is better; of every other figure, all of them accuracies, more


def check(figure: str | None, known: Collection[str]) -> None:
    """Raise UserError unless ``figure`` is None or one of the ``known`` ones, which an evaluation gives."""
    if figure is not None and figure not in known:
        if not known:
            raise UserError(f"output.best: expected evaluation.sources to judge {figure} by, got none")
        raise UserError(f"output.best: expected one of {', '.join(known)}, got {figure!r}")


class Best:
    """The best step so far.

    Attributes:
        figure: that decides, or None where nothing is asked for. What stands behind a slash is one source of several.
        found: None, or its ``step``, ``figure`` and ``value``, as plain JSON.
    """

    def __init__(self, figure: str | None) -> None:
        self.figure = figure
        self.found: dict[str, Any] | None = None

    def __str__(self) -> str:
        """For people."""
        return f"the best by {self.figure} ({self.found['value']:.4g})" if self.found else "no best one"

    def see(self, step: int, figures: Mapping[str, float]) -> bool:
        """Whether this step is better than all before; a tie is not, nor is NaN."""
        value = None if self.figure is None else figures[self.figure]
        if value is None or value != value or not (self.found is None or self._better(value, self.found["value"])):
            return False
        self.found = {"step": step, "figure": self.figure, "value": value}
        return True

    def _better(self, new: float, old: float) -> bool:
        return new < old if self.figure.partition("/")[0] in LOWER else new > old

    def load(self, found: Mapping[str, Any] | None) -> None:
        """Take up ``found``, unless it was judged by another figure."""
        same = found is not None and found["figure"] == self.figure
        self.found = dict(found) if same else None
