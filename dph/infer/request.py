"""Requests, their answers, and the interface of the engines that answer them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from dph.errors import UserError
from dph.infer.sampling import INT64, Sampling, checked

if TYPE_CHECKING:
    from torch import Tensor

    from dph.model.judging import JudgingModel

STOP_ROOM = 64  # tokens by which an answer may grow as a stop text cuts its last token into pieces


@dataclass(frozen=True)
class Answer:
    """One sampled answer.

    Attributes:
        index: its number among those of its prompt.
        tokens: its tokens, with the end-of-turn token if it is finished.
        finished: whether it ended with the end-of-turn token, or before a stop text.
        logprob: summed log-probability of its tokens in nats; of one that a stop text ended, that of the answer as it
            stands, end-of-turn token included.
        mean_logprob: mean log-probability of the tokens of its content; NaN for an empty answer.
        rewards: {head: reward}; empty for an answer that is not finished, or without reward heads.
        spreads: {head: standard deviation of the rewards over the members of an ensemble}.
        pruned: whether it was dropped before its end.
    """

    index: int
    tokens: tuple[int, ...]
    finished: bool
    logprob: float
    mean_logprob: float
    rewards: dict[str, float] = field(default_factory=dict)
    spreads: dict[str, float] = field(default_factory=dict)
    pruned: bool = False


Plan = Callable[[Sequence[Answer]], int]
"""From all answers so far to the number of further ones; called at first without any, and again when all are there."""


def fixed(n: int) -> Plan:
    """Return the plan of ``n`` answers."""
    return lambda answers: 0 if answers else n


@dataclass(frozen=True)
class Pruning:
    """Successive halving: after every ``every`` tokens the weaker half of a prompt's answers is dropped.

    An answer counts by the reward that ``head`` would give if it ended there; finished ones by their own, and they are
    never dropped.
    """

    every: int
    head: str


class Request:
    """One prompt and its answers.

    Args:
        prompt: token ids up to the beginning of the answer (``dph.chat.prompt``).
        plan: see ``Plan``.
        sampling: options.
        seed: of the answers; None draws one from torch's generator.
        rewards: whether finished answers get rewards.
        pruning: see ``Pruning``; None for none.

    Attributes:
        answers: those that are complete, in the order of their indices.
        done: whether no more will come.
        wanted, started: answers that the plan has asked for so far, and those that have begun.
        number, slot, read, logits, reserved: notes of its engine, see ``PromptReader``.

    Raises UserError for an empty prompt, and ValueError for a seed out of range.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        plan: Plan,
        sampling: Sampling,
        *,
        seed: int | None = None,
        rewards: bool = True,
        pruning: Pruning | None = None,
    ) -> None:
        self.prompt, self.plan, self.sampling = tuple(prompt), plan, sampling
        if not self.prompt:
            raise UserError("prompt: expected at least one token, got none")
        self.rewards, self.pruning = rewards, pruning
        if seed is None:
            seed = 0 if sampling.greedy else int(torch.randint(INT64 - 1, ()))
        self.seed = checked("seed", seed)
        self.done = False
        self._complete: dict[int, Answer] = {}
        self.wanted = self.started = 0
        self.number = -1  # in its engine
        self.slot: int | None = None  # first row of the prompt
        self.read = 0  # tokens of the prompt that have been read
        self.logits: Tensor | None = None  # [V] after the prompt
        self.reserved: list[int] = []  # first rows of candidates that have not started
        self._extend()

    @property
    def answers(self) -> list[Answer]:
        """The complete answers by index."""
        return [self._complete[i] for i in sorted(self._complete)]

    @property
    def rows(self) -> int:
        """Rows of keys and values of one candidate."""
        return self.sampling.max_new_tokens + (STOP_ROOM if self.sampling.stop else 0)

    @property
    def gang(self) -> int:
        """Candidates that have to start together."""
        waiting = self.wanted - self.started
        return waiting if self.pruning is not None else min(waiting, 1)

    def _extend(self) -> None:
        """Ask the plan for further answers."""
        more = self.plan(self.answers)
        self.wanted += more
        self.done = more <= 0

    def add(self, answer: Answer) -> None:
        """Take a complete answer; the last one decides whether more are sampled."""
        self._complete[answer.index] = answer
        if len(self._complete) == self.wanted:
            self._extend()


class Engine(ABC):
    """Requests in the order of their arrival, and the steps that answer them.

    ``end``: the token that ends an answer.
    """

    def __init__(self, model: JudgingModel, tokenizer: Any, end: int) -> None:
        self.model, self.tokenizer, self.end = model, tokenizer, end
        self.requests: list[Request] = []

    def submit(self, request: Request) -> Request:
        """Queue a request. Raises UserError if it can never be answered."""
        self.check(request)
        if not request.done:
            self.requests.append(request)
        return request

    @abstractmethod
    def check(self, request: Request) -> None:
        """Raise UserError for a request that can never be answered."""

    @abstractmethod
    def step(self) -> list[tuple[Request, Answer]]:
        """Work on the requests for a while; return the answers that this has completed."""

    @abstractmethod
    def cancel(self, request: Request) -> None:
        """Drop a request; its answers so far stay."""

    def partial(self, request: Request) -> dict[int, tuple[int, ...]]:
        """Return the tokens so far of the request's answers that are not complete, by index."""
        return {}

    def run(self) -> None:
        """Answer all requests."""
        while self.requests:
            self.step()
