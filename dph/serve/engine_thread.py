"""One thread that owns the engine and all calls of the model; the requests of all clients are batched together."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dph.errors import UserError
from dph.infer.attached_engine import AttachedEngine
from dph.infer.best_of_n import probabilities, ranked
from dph.infer.engine import pool_rows
from dph.infer.pooled_engine import PooledEngine
from dph.infer.request import Answer, Engine, Request
from dph.model.backbone import Backbone
from dph.model.judging import MAX_TOKENS, JudgingModel
from dph.serve.jobs import Ended, EngineFailed, Event, Generation, Job, Judgement, Piece, Ranked, Rewards
from dph.serve.limits import Limits, origin, out_of_time, stopping
from dph.serve.text_stream import TextStream

log = logging.getLogger(__name__)
STOP_SECONDS = 10
INTERVAL = 0.05  # seconds between two reports of growing candidates, if there are several


class EngineThread:
    """The engine, its thread, and the jobs that it works on.

    Args:
        model, tokenizer: of all requests; nothing else may use them while the thread runs.
        limits: of the tokens and the time of a request.
        cache_bytes: of keys and values.

    Raises UserError if the keys and values of one request do not fit.
    """

    def __init__(self, model: JudgingModel, tokenizer: Any, limits: Limits, cache_bytes: int) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self._cache_bytes = cache_bytes
        self._engine = self._new_engine()
        self._jobs: set[Job] = set()  # of all kinds, from submission to their last event
        self._lock = threading.Lock()  # of _jobs and _is_stopping
        self._is_stopping = False
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._generations: dict[Request, Generation] = {}
        self._judgements: dict[Judgement, None] = {}  # in the order of their arrival
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # Called by other threads

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Drop all jobs and end the thread, which may be in the middle of a long answer of an attached network."""
        with self._lock:
            self._is_stopping = True
        self._commands.put(None)
        self._thread.join(STOP_SECONDS)

    def check(self, request: Request) -> None:
        """Raise UserError for a request that can never be answered; any thread may call this."""
        self._engine.check(request)

    def submit(self, job: Job) -> None:
        """Queue a job; its results go to its ``report``. Raises ApiError (503) while the server stops."""
        with self._lock:
            if self._is_stopping:
                raise stopping()
            self._jobs.add(job)
        self._commands.put(lambda: self._accept(job))

    def cancel(self, job: Job) -> None:
        """Drop a job whose client has gone; no effect on one that has ended."""
        self._commands.put(lambda: self._forget(job))

    @property
    def jobs(self) -> int:
        """Jobs that run or wait."""
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and takes jobs."""
        return self._thread.is_alive() and not self._is_stopping

    # The engine's thread

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # PyTorch keeps the number by thread
        while self._take_commands():
            self._expire()
            self._judge()
            self._step()
        for job in list(self._jobs):
            self._end(job, stopping())

    def _take_commands(self) -> bool:
        """Carry out what other threads have queued; wait for it if there is nothing to do. False at the end."""
        while True:
            try:
                command = self._commands.get(block=not (self._generations or self._judgements))
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _accept(self, job: Job) -> None:
        if isinstance(job, Judgement):
            self._judgements[job] = None
            return
        try:
            self._engine.submit(job.request)
        except Exception as error:  # it has one owner, and others go on
            self._end(job, error)
        else:
            self._generations[job.request] = job

    def _forget(self, job: Job) -> None:
        """Remove a job without a further event."""
        with self._lock:
            self._jobs.discard(job)
        if isinstance(job, Judgement):
            self._judgements.pop(job, None)
        elif self._generations.pop(job.request, None) is not None:
            self._engine.cancel(job.request)

    def _end(self, job: Job, event: Event) -> None:
        """Report the last event of a job."""
        self._forget(job)
        job.report(event)

    def _expire(self) -> None:
        """Drop jobs that took too long."""
        now = time.monotonic()
        for job in [*self._generations.values(), *self._judgements]:
            if now > job.deadline:
                self._end(job, out_of_time(self.limits.seconds))

    # Judging

    def _judge(self) -> None:
        """Compute one packed batch of the answers that wait, of as many jobs as fit."""
        groups, owners, tokens = [], [], 0
        for job in self._judgements:
            for group in job.groups[job.done :]:
                tokens += sum(map(len, group))
                if groups and tokens > MAX_TOKENS:
                    break
                groups.append(group)
                owners.append(job)
            if tokens > MAX_TOKENS:
                break
        if not groups:
            return
        try:
            judged = self.model.judge(groups, logprobs=False)
        except Exception as error:
            for job in dict.fromkeys(owners):
                self._end(job, error)
            return
        for job, own in zip(owners, judged, strict=True):
            job.done += 1
            for sums, values in ((job.rewards, own.rewards), (job.spreads, own.spreads)):
                for head, numbers in values.items():
                    sums.setdefault(head, []).extend(numbers)
        for job in dict.fromkeys(owners):
            if job.done == len(job.groups):
                self._end(job, Rewards(job.rewards, job.spreads))

    # Generation

    def _new_engine(self) -> Engine:
        if not isinstance(self.model.backbone, Backbone):
            return AttachedEngine(self.model, self.tokenizer)
        rows, least = pool_rows(self.model, self._cache_bytes), self.limits.tokens + 256
        if rows < least:
            raise UserError(
                f"--cache-mib, --max-tokens: expected a cache of at least {least} tokens, got one of {rows}"
            )
        return PooledEngine(self.model, self.tokenizer, rows)

    def _step(self) -> None:
        """Let the engine work for a while, and report what it has."""
        if not self._generations:
            return
        try:
            answers = self._engine.step()
        except Exception as error:  # which request it came from is unknown, and so is the engine's state
            log.error("the engine failed (%s), %d requests are dropped", origin(error), len(self._generations))
            failed = list(self._generations.values())
            self._generations.clear()
            self._engine = self._new_engine()
            for job in failed:
                self._end(job, EngineFailed())
            return
        complete: dict[Request, list[Answer]] = {}
        for request, answer in answers:
            complete.setdefault(request, []).append(answer)
        for request, job in list(self._generations.items()):
            try:
                if job.live and request.done:  # also the copies of the most probable answer, which no step returns
                    self._report(job, [answer for answer in request.answers if answer.index not in job.ended])
                elif job.live:
                    self._report(job, complete.get(request, ()))
                if request.done:
                    self._finish(job)
            except Exception as error:
                self._end(job, error)

    def _report(self, job: Generation, complete: Sequence[Answer]) -> None:
        """Report what the candidates of a live job have added."""
        for answer in complete:
            content = answer.tokens[: len(answer.tokens) - answer.finished]
            text = self.tokenizer.decode(content, skip_special_tokens=False)
            job.report(Ended(answer.index, self._stream(job, answer.index).finish(text), answer))
            job.ended.add(answer.index)
        now = time.monotonic()
        if job.choice.n > 1 and now - job.reported < INTERVAL:
            return
        job.reported = now
        for index, tokens in self._engine.partial(job.request).items():
            if piece := self._stream(job, index).add(tokens):
                job.report(Piece(index, piece))

    def _stream(self, job: Generation, index: int) -> TextStream:
        if index not in job.streams:
            job.streams[index] = TextStream(self.tokenizer, self._engine.end, job.request.sampling.stop)
        return job.streams[index]

    def _finish(self, job: Generation) -> None:
        answers = job.request.answers
        weigh = probabilities(self.model, job.choice.head)
        candidates = ranked(job.request.prompt, answers, self.tokenizer, job.choice, weigh)
        indices = [candidate.index for candidate in candidates]
        self._end(job, Ranked(candidates, indices, sum(len(answer.tokens) for answer in answers)))
