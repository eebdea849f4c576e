"""Labels of answers to one prompt: one is better than another, or good or bad by itself; for all heads or one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dph.chat import Encoded, Message


@dataclass(frozen=True, slots=True)
class Label:
    """Indices of the better and the worse of two answers; None if a single answer is labelled bad or good.

    Attributes:
        head: name of the reward head that learns it; None for all.
        weight: relative to a pair's.
        margin: difference of rewards that the contrastive objective is offset by.
    """

    better: int | None
    worse: int | None
    head: str | None = None
    weight: float = 1.0
    margin: float = 0.0

    @property
    def is_pair(self) -> bool:
        """Whether it compares two answers."""
        return self.better is not None and self.worse is not None


@dataclass(frozen=True, slots=True)
class Labelled:
    """Conversations that end in answers to one prompt, and labels on the answers."""

    answers: list[list[Message]]
    labels: tuple[Label, ...]


class EncodedAnswers(tuple):
    """Encoded answers to one prompt, with ``labels``; a plain tuple (chosen, rejected) is a pair for all heads."""

    labels: tuple[Label, ...]

    def __new__(cls, answers: Iterable[Encoded], labels: Sequence[Label] = ()) -> EncodedAnswers:
        """Create the tuple of ``answers``."""
        made = super().__new__(cls, answers)
        made.labels = tuple(labels)
        return made

    def __repr__(self) -> str:
        """Return a text with the labels, which fingerprints depend on."""
        return f"EncodedAnswers({super().__repr__()}, {self.labels!r})"


PAIR = (Label(0, 1),)


def labels_of(answers: Sequence[Encoded]) -> tuple[Label, ...]:
    """Return the labels on encoded answers."""
    return answers.labels if isinstance(answers, EncodedAnswers) else PAIR
