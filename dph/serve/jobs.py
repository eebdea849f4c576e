"""Jobs of the engine's thread, and the events that it reports about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dph.chat import Encoded
    from dph.infer.best_of_n import Candidate, Choice
    from dph.infer.request import Answer, Request
    from dph.serve.text_stream import TextStream


class EngineFailed(RuntimeError):
    """The engine failed while it worked on this request and others; the next ones get a new engine."""


@dataclass(frozen=True)
class Piece:
    """Text that a candidate has added."""

    index: int
    text: str


@dataclass(frozen=True)
class Ended:
    """A candidate that is complete; ``text`` is the rest of its text."""

    index: int
    text: str
    answer: Answer


@dataclass(frozen=True)
class Ranked:
    """All candidates, best first, with their indices and the number of sampled tokens."""

    candidates: list[Candidate]
    indices: list[int]
    sampled_tokens: int


@dataclass(frozen=True)
class Rewards:
    """Rewards and spreads of all answers of a :class:`Judgement` in order, by head."""

    rewards: dict[str, list[float]]
    spreads: dict[str, list[float]]


Event = Piece | Ended | Ranked | Rewards | Exception  # the last three end a job


@dataclass(eq=False, kw_only=True)
class Job:
    """Work for one client.

    Attributes:
        report: is called in the engine's thread with each event.
        deadline: on the clock of ``time.monotonic``.
    """

    report: Callable[[Event], None]
    deadline: float


@dataclass(eq=False, kw_only=True)
class Generation(Job):
    """Candidates for one prompt; ``live`` reports them while they grow."""

    request: Request
    choice: Choice
    live: bool
    streams: dict[int, TextStream] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)  # indices of candidates that were reported as complete
    reported: float = 0.0


@dataclass(eq=False, kw_only=True)
class Judgement(Job):
    """Rewards of answers; each group shares a prompt."""

    groups: list[list[Encoded]]
    done: int = 0  # groups
    rewards: dict[str, list[float]] = field(default_factory=dict)
    spreads: dict[str, list[float]] = field(default_factory=dict)
