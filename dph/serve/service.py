"""From checked bodies of requests to jobs of the engine's thread, and from its events to results."""

from __future__ import annotations

import asyncio
import copy
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from dph import chat
from dph.chat import Encoded, Message
from dph.errors import UserError, shown
from dph.evaluate.best_of import NORMALISERS
from dph.infer.best_of_n import Choice
from dph.infer.request import Request
from dph.infer.sampling import RULES, Rule, Sampling, checked
from dph.model.judging import MAX_TOKENS, JudgingModel
from dph.serve.bodies import Candidates, ChatMessage, Rerank, Score
from dph.serve.jobs import Event, Generation, Job, Judgement, Ranked, Rewards
from dph.serve.limits import ApiError, Limits, refusal

if TYPE_CHECKING:
    from dph.serve.engine_thread import EngineThread

MAX_NEW_TOKENS = Sampling.max_new_tokens
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "stop")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Asked:
    """One prompt with its options, checked.

    Attributes:
        n: candidates that the client wants of the ``choice.n`` that are sampled.
    """

    request: Request
    choice: Choice
    n: int


class Service:
    """A model that answers, scores and ranks for many clients.

    Args:
        engine: the thread that owns the model.
        tokenizer: of the model; a copy of it is used.
        name: of the model in requests.
        heads: reward heads that may be requested; the first is the default.
        limits: see :class:`Limits`.
        best_of: candidates that are sampled for a request that does not give their number.

    Raises UserError if the limits do not fit.
    """

    def __init__(
        self,
        engine: EngineThread,
        tokenizer: Any,
        name: str,
        heads: Sequence[str],
        limits: Limits,
        *,
        best_of: int = 1,
    ) -> None:
        if best_of > limits.candidates:
            raise UserError(f"--best-of: expected at most --max-candidates ({limits.candidates}), got {best_of}")
        self.name, self.heads, self.limits, self.best_of = name, tuple(heads), limits, best_of
        self.engine = engine
        self._model: JudgingModel = engine.model
        context = getattr(self._model.backbone, "context", None)
        self.longest = limits.tokens if context is None else min(limits.tokens, context)
        # The thread below encodes with a tokenizer of its own: tokenizers cannot change settings while others read.
        self._tokenizer = copy.deepcopy(tokenizer)
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")
        self.calibrated = set()
        for head in heads:
            if self._model.head_records.get(head, {}).get("calibration") is not None:
                self.calibrated.add(head)

    def start(self) -> None:
        """Start to work on jobs."""
        self.engine.start()

    def stop(self) -> None:
        """Drop what is left of the work."""
        self.engine.stop()
        self._encoding.shutdown(cancel_futures=True)

    # Checks

    def check_model(self, name: str | None) -> None:
        """Raise ApiError (404) for the name of another model."""
        if name is not None and name != self.name:
            message = f"model: expected {self.name}, got {shown(name)}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_head(self, name: str, param: str = "head") -> str:
        """Return the name of a head; raises ApiError (400) if the server has none of that name."""
        if name not in self.heads:
            expected = f"one of {', '.join(self.heads)}" if self.heads else "none: the model has no reward head"
            raise ApiError(400, f"{param}: expected {expected}, got {shown(name)}", param=param, code="head_not_found")
        return name

    async def candidates(self, body: Candidates, n: int = 1, max_tokens: str = "max_tokens") -> Asked:
        """Return the prompt and options of a request; ``max_tokens`` is the field's name for errors.

        Raises ApiError (400, 404) for what is wrong or above a limit.
        """
        self.check_model(body.model)
        try:
            n = self._count("n", n)
            best_of = max(n, self.best_of) if body.best_of is None else self._count("best_of", body.best_of)
            if best_of < n:
                raise UserError(f"best_of: expected at least n ({n}), got {best_of}")
            choice = self._choice(body, best_of)
            if n > 1 and (body.confidence is not None or body.prune_every is not None):
                raise UserError(f"n: expected 1 with confidence or prune_every, which end candidates early, got {n}")
            given = getattr(body, max_tokens)
            if given is not None:
                _option(max_tokens, given, RULES["max_new_tokens"])
            if body.messages[-1].role != "user":
                role = body.messages[-1].role
                raise UserError(f"messages: expected the user's message at the end, got one of {role}")
            messages = _messages(body.messages)
            prompt = await self._encoded(lambda: chat.prompt(messages, self._tokenizer))
            room = self.longest - len(prompt)
            if room < (given or 1):
                raise UserError(
                    f"messages, {max_tokens}: expected at most {self.longest} tokens in all, got a prompt of "
                    f"{len(prompt)} and answers of {given or 1}"
                )
            options = {name: getattr(body, name) for name in SAMPLING}
            sampling = Sampling(max_new_tokens=given or min(MAX_NEW_TOKENS, room), **options)
            # 53 bits: programs that read all numbers as float64 can repeat the request.
            seed = secrets.randbits(53) if body.seed is None else checked("seed", body.seed)
            request = choice.request(self._model, prompt, sampling, seed)
            self.engine.check(request)
        except ValueError as error:
            raise refusal(error) from None
        return Asked(request, choice, n)

    def _count(self, name: str, value: int) -> int:
        """Return n or best_of. Raises UserError above the limit."""
        most = self.limits.candidates
        return _option(name, value, Rule(int, lambda count: 1 <= count <= most, f"a number from 1 to {most}"))

    def _choice(self, body: Candidates, best_of: int) -> Choice:
        """Return the way to rank. Raises ValueError or ApiError if the model lacks what it needs."""
        head = self.check_head(body.head) if body.head is not None else next(iter(self.heads), None)
        rank = body.rank or ("reward" if head else "logprob")
        if head is None and rank != "logprob":
            raise UserError(f"rank: expected logprob, since the model has no reward head, got {rank}")
        normalise = str.strip if body.normalise == "strip" else NORMALISERS[body.normalise]
        names = ("risk", "confidence", "round_size", "prune_every")
        choice = Choice(
            n=best_of, head=head, rank=rank, normalise=normalise, **{name: getattr(body, name) for name in names}
        )
        choice.check(self._model)
        return choice

    async def answers(self, conversations: Sequence[Sequence[Message]], groups: bool, where: str) -> Answers:
        """Return conversations as encoded answers to judge; ``groups``: they differ in the last message alone.

        Raises ApiError (400) for too many, and for one that is too long or does not end in an answer.
        """
        if len(conversations) > self.limits.documents:
            message = f"{where}: expected at most {self.limits.documents}, got {len(conversations)}"
            raise ApiError(400, message, param=where)

        def encode() -> Answers:
            encoded = []
            for i, messages in enumerate(conversations):
                chat.check(messages, f"{where}[{i}]")
                chat.check_final_answer(messages, f"{where}[{i}]")
                try:
                    answer = chat.encode(messages, self._tokenizer, last_only=True)
                except UserError as error:
                    raise UserError(f"{where}[{i}]: {error}") from None
                if len(answer) > self.longest:
                    raise UserError(f"{where}[{i}]: expected at most {self.longest} tokens, got {len(answer)}")
                encoded.append(answer)
            return Answers(_grouped(encoded, groups), sum(map(len, encoded)))

        try:
            return await self._encoded(encode)
        except ValueError as error:
            raise refusal(error) from None

    async def score(self, body: Score) -> Answers:
        """Return the answers of a request to score. Raises ApiError (400, 404)."""
        self.check_model(body.model)
        for head in body.heads or ():
            self.check_head(head, "heads")
        self._check_judges()
        return await self.answers(list(map(_messages, body.conversations)), False, "conversations")

    async def rerank(self, body: Rerank) -> tuple[str, Answers]:
        """Return the head of a request to rank documents, and these as answers to judge. Raises ApiError (400, 404)."""
        self.check_model(body.model)
        self._check_judges()
        head = self.heads[0] if body.head is None else self.check_head(body.head)
        query = Message(role="user", content=body.query)
        pairs = [[query, Message(role="assistant", content=text)] for text in body.documents]
        return head, await self.answers(pairs, True, "documents")

    def _check_judges(self) -> None:
        if not self.heads:
            raise ApiError(400, "model: expected one with reward heads, got one without", param="model")

    async def _encoded(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._encoding, work)

    def probabilities(self, head: str, rewards: Sequence[float]) -> list[float | None]:
        """Return the probabilities that answers are good; None without a calibration."""
        if head not in self.calibrated:
            return [None] * len(rewards)
        return self._model.probability(rewards, head).tolist()

    # Work

    @asynccontextmanager
    async def generation(self, asked: Asked, live: bool) -> AsyncIterator[AsyncIterator[Event]]:
        """Submit a prompt and give its events up to ``Ranked``; the job is dropped at the end of the context.

        Raises ApiError (503) while the server stops, and from the events what the job failed with.
        """
        async with self._job(Generation, request=asked.request, choice=asked.choice, live=live) as events:
            yield events

    async def rewards(self, answers: Answers) -> Rewards:
        """Return the rewards of answers; dropped if the caller is cancelled. Raises ApiError as ``generation``."""
        async with self._job(Judgement, groups=answers.groups) as events:
            return await anext(events)

    @asynccontextmanager
    async def _job(self, kind: type[Job], **fields: Any) -> AsyncIterator[AsyncIterator[Event]]:
        loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def report(event: Event) -> None:
            loop.call_soon_threadsafe(waiting.put_nowait, event)

        async def events() -> AsyncIterator[Event]:
            while True:
                event = await waiting.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Ranked | Rewards):
                    return

        job = kind(report=report, deadline=time.monotonic() + self.limits.seconds, **fields)
        self.engine.submit(job)
        try:
            yield events()
        finally:
            self.engine.cancel(job)


@dataclass(frozen=True)
class Answers:
    """Groups of answers to judge, and their tokens in all."""

    groups: list[list[Encoded]]
    tokens: int


def _grouped(encoded: Sequence[Encoded], together: bool) -> list[list[Encoded]]:
    """Return answers in groups, of at most ``MAX_TOKENS`` if they share a prompt."""
    groups: list[list[Encoded]] = []
    room = 0
    for answer in encoded:
        if not together or len(answer) > room:
            groups.append([])
            room = MAX_TOKENS
        groups[-1].append(answer)
        room -= len(answer)
    return groups


def _messages(messages: Sequence[ChatMessage]) -> list[Message]:
    return [Message(role=message.role, content=message.content) for message in messages]


def _option(name: str, value: Any, rule: Rule) -> Any:
    """Return a value that fits the rule. Raises UserError with the field's name."""
    if not rule.fits(value):
        raise UserError(f"{name}: expected {rule.expected}, got {shown(value)}")
    return value
