"""Sampling of several answers to each of many prompts, continued together token by token.

A prompt is computed once, and all of its candidates read its keys and values. Candidates that end leave, and waiting
ones take their place. The reward of an answer comes from the step that reads its end-of-turn token, its log-probability
from the logits that its tokens were drawn from: nothing is computed twice.

An answer depends on its prompt, the seed and its number alone: on the CPU no other prompt or candidate changes a bit of
it (``dph_kernels.dispatch.batch_invariant``).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dph import chat
from dph.errors import UserError
from dph.infer.choice import candidate_key, choose, prompt_key
from dph.infer.sampling import INT64, Sampling, checked
from dph.model.backbone import Backbone
from dph.model.heads import JudgedStates
from dph.model.judging import JudgingModel
from dph.model.kv_pool import KVPool
from dph_kernels.dispatch import batch_invariant
from dph_kernels.layout import COLUMNS, PackedLayout
from dph_kernels.transfer import to_device

CHUNK = (
    512  # tokens of a prompt that are read at once: multiples of the blocks of attention, counted from its beginning
)
BATCH = 1024  # candidates that are continued together, and tokens of prompts that are read between two of their tokens
POOL_BYTES = 1 << 30  # of keys and values, unless a single prompt with one candidate needs more
# PyTorch's products of matrices on the CPU take another way for fewer rows, with other rounding.
LEAST_ROWS, ROW_MULTIPLE = 16, 8
MOST_SAMPLINGS = 64  # before those that no candidate needs are dropped
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
        self.rewards, self.pruning = rewards, pruning
        self.seed = int(torch.randint(INT64 - 1, ())) if seed is None else checked("seed", seed)
        self.done = False
        self._key = prompt_key(self.seed, self.prompt)
        self._complete: dict[int, Answer] = {}
        self._wanted = self._started = 0
        self._slot: int | None = None  # first row of the prompt
        self._read = 0  # tokens of the prompt that have been read
        self._logits: Tensor | None = None  # [V] after the prompt
        self._reserved: list[int] = []  # first rows of candidates that have not started
        self._copies = 1  # of the most probable answer
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
        waiting = self._wanted - self._started
        return waiting if self.pruning is not None else min(waiting, 1)

    def _extend(self) -> None:
        """Ask the plan for further answers."""
        more = self.plan(self.answers)
        while more > 0 and self.sampling.greedy and self._complete:
            self._copy(more)
            more = self.plan(self.answers)
        if more > 0 and self.sampling.greedy:  # all are equal: one is sampled
            self._copies, more = more, 1
        self._wanted += more
        self.done = more <= 0

    def _copy(self, times: int) -> None:
        """Add ``times`` copies of the first answer."""
        for index in range(len(self._complete), len(self._complete) + times):
            self._complete[index] = replace(self._complete[0], index=index)

    def _add(self, answer: Answer) -> None:
        """Take a complete answer; the last one decides whether more are sampled."""
        self._complete[answer.index] = answer
        if len(self._complete) == self._wanted:
            self._copy(self._copies - 1)
            self._copies = 1
            self._extend()


class Engine(ABC):
    """Requests in the order of their arrival, and the steps that answer them."""

    def __init__(self, model: JudgingModel, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.end = chat.markup(tokenizer).end_of_turn
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


def engine_for(model: JudgingModel, tokenizer: Any, requests: Sequence[Request] = ()) -> Engine:
    """Return an engine for the model, with room for these requests as far as the memory's bound allows."""
    if not isinstance(model.backbone, Backbone):
        return AttachedEngine(model, tokenizer)
    wanted = least = 0
    for request in requests:
        prompt, one = len(request.prompt) + 1, request.rows + 1
        wanted += prompt + one * request._wanted
        least = max(least, prompt + one * max(request.gang, 1))
    return PooledEngine(model, tokenizer, max(least, min(wanted, pool_rows(model))) + 2)


def pool_rows(model: JudgingModel, size: int = POOL_BYTES) -> int:
    """Return the rows of keys and values of all layers that ``size`` bytes hold."""
    attention = model.backbone.blocks[0].attention
    row = 2 * attention.key_heads * attention.head_dim * model.dtype.itemsize
    return max(size // (row * len(model.backbone.blocks)), 1)


RUNNING = np.dtype(
    [
        ("number", "i8"),  # key of ``PooledEngine._owners``
        ("start", "i8"),  # first row of the candidate
        ("prompt", "i8"),  # first row of the prompt
        ("length", "i8"),  # tokens of the prompt
        ("said", "i8"),  # tokens of the candidate; the last ``fresh`` have not been read
        ("fresh", "i8"),
        ("limit", "i8"),  # most tokens
        ("ending", "?"),  # whether its last token is the end of its turn
        ("rewards", "?"),  # whether that token is judged
        ("stops", "?"),  # whether it has stop texts
        ("sampling", "i8"),  # place in ``PooledEngine._samplings``
        ("key", "u4", 2),
    ]
)


class PooledEngine(Engine):
    """Continuous batching over a pool of keys and values.

    Args:
        model: with a backbone of this package.
        rows: of the pool; a prompt of P tokens and a candidate of at most N take P + 1 and N + 1.
        batch: candidates that are continued together at most.
    """

    def __init__(self, model: JudgingModel, tokenizer: Any, rows: int, batch: int = BATCH) -> None:
        super().__init__(model, tokenizer)
        self.pool, self.batch = KVPool(rows), batch
        self._token_at = np.zeros(rows, np.int64)  # of each row of the pool
        self._logprob_at = np.zeros(rows, np.float32)
        self._running = np.empty(0, RUNNING)
        self._owners: dict[int, tuple[Request, int]] = {}  # number -> request and index
        self._numbers = 0
        self._samplings: list[Sampling] = []
        self._scratch = self.pool.take(1)  # row of padding tokens

    def check(self, request: Request) -> None:
        """See :meth:`Engine.check`."""
        rows = len(request.prompt) + 1 + (request.rows + 1) * max(request.gang, 1)
        if request.gang > self.batch or rows > self.pool.rows - 2:
            raise UserError(
                f"prompt, max_new_tokens: expected at most {self.pool.rows - 2} rows of keys and values and "
                f"{self.batch} answers at once, got {len(request.prompt)} tokens and {max(request.gang, 1)} answers of "
                f"up to {request.rows}"
            )
        if request.pruning is not None:
            self.model.check_heads(request.pruning.head)

    def cancel(self, request: Request) -> None:
        """See :meth:`Engine.cancel`."""
        if request in self.requests:
            for start in request._reserved:
                self.pool.free(start)
            request._reserved = []
            mine = np.array([self._owners[number][0] is request for number in self._running["number"]], dtype=bool)
            for number, start in self._running[mine][["number", "start"]].tolist():
                del self._owners[number]
                self.pool.free(start)
            self._running = self._running[~mine]
            self._close(request)

    def partial(self, request: Request) -> dict[int, tuple[int, ...]]:
        """See :meth:`Engine.partial`."""
        tokens = {}
        for number, start, said in self._running[["number", "start", "said"]].tolist():
            owner, index = self._owners[number]
            if owner is request:
                tokens[index] = tuple(self._token_at[start : start + said].tolist())
        return tokens

    @torch.no_grad()
    def step(self) -> list[tuple[Request, Answer]]:
        """Read the next tokens of all candidates, and of prompts that wait; draw a token for each candidate."""
        self._admit()
        with batch_invariant():
            self._read_prompts()
            complete, logits = self._read_candidates()
            started, first = self._start()
            self._running = np.concatenate([self._running, started])
            if len(self._running):
                self._draw(torch.cat([part for part in (logits, first) if part is not None]))
        complete += self._sort_out()
        for request, answer in complete:
            request._add(answer)
        for request in [request for request in self.requests if request.done]:
            self._close(request)
        return complete

    # Prompts

    def _admit(self) -> None:
        """Take rows for candidates of the prompts that are there, then for further prompts, first come first served."""
        room = self.batch - len(self._running) - sum(len(request._reserved) for request in self.requests)
        is_full = False
        for request in self.requests:
            if request._slot is None:
                if is_full or not self._open(request, room):
                    is_full = True
                    continue
                room -= len(request._reserved)
            while 0 < request.gang <= room and request._started + len(request._reserved) < request._wanted:
                taken = self._take(request, request.gang)
                if not taken:
                    break
                request._reserved += taken
                room -= len(taken)

    def _open(self, request: Request, room: int) -> bool:
        """Take rows for a prompt and the candidates that start with it; return whether there were enough."""
        if request.gang > room:
            return False
        slot = self.pool.take(len(request.prompt))
        if slot is None:
            return False
        taken = self._take(request, request.gang)
        if not taken:
            self.pool.free(slot)
            return False
        request._slot, request._reserved = slot, taken
        self._token_at[slot : slot + len(request.prompt)] = request.prompt
        return True

    def _take(self, request: Request, count: int) -> list[int]:
        """Return the first rows of ``count`` candidates; empty if there is no room for all of them."""
        taken: list[int] = []
        for _ in range(count):
            start = self.pool.take(request.rows)
            if start is None:
                for other in taken:
                    self.pool.free(other)
                return []
            taken.append(start)
        return taken

    def _read_prompts(self) -> None:
        """Read chunks of prompts, up to the tokens of a batch, and keep the logits after those that are complete."""
        parts, budget = [], self.batch
        for request in self.requests:
            read, length = request._read, len(request.prompt)
            while request._slot is not None and read < length and budget > 0:
                count = min(CHUNK, length - read)
                if any(owner is request for owner, _, _ in parts):
                    break  # a chunk reads the ones before it from the pool
                parts.append((request, read, count))
                budget -= count
        if not parts:
            return
        counts, table, rows, last = [], [], [], []
        start = 0
        total = sum(count for _, _, count in parts)
        for request, read, count in parts:
            slot, end = request._slot, start + count
            keys = (self.pool.rows + start, self.pool.rows + end)
            table.append((start, end, *keys, slot, slot + read, read))
            rows.append(np.arange(slot + read, slot + read + count))
            counts.append(count)
            last.append(end - 1)
            start = end
        padded = _padded_rows(total)
        rows = np.concatenate([*rows, np.full(padded - total, self._scratch)])
        layout = PackedLayout(torch.tensor(table).reshape(-1, len(COLUMNS)), padded, padded, self.pool.rows)
        hidden = self._forward(rows, layout, self._token_at[rows], decode=False)
        complete = [i for i, (request, read, count) in enumerate(parts) if read + count == len(request.prompt)]
        logits = self._logits(hidden, np.array(last)[complete]) if complete else None
        for i, row in zip(complete, () if logits is None else logits, strict=True):
            parts[i][0]._logits = row.clone()
        for request, read, count in parts:
            request._read = read + count

    def _close(self, request: Request) -> None:
        """Return the rows of a prompt."""
        request.done = True
        self.requests.remove(request)
        if request._slot is not None:
            self.pool.free(request._slot)
        request._slot = request._logits = None

    # Candidates

    def _start(self) -> tuple[np.ndarray, Tensor | None]:
        """Return the candidates that begin now, and the logits [C, V] of their first tokens."""
        began, logits = [], []
        if len(self._samplings) > MOST_SAMPLINGS:  # of all requests so far
            kinds, self._running["sampling"] = np.unique(self._running["sampling"], return_inverse=True)
            self._samplings = [self._samplings[kind] for kind in kinds]
        for request in self.requests:
            if request._logits is None or not request._reserved:
                continue
            sampling = request.sampling
            if sampling not in self._samplings:
                self._samplings.append(sampling)
            place = self._samplings.index(sampling)
            for start in request._reserved:
                number, index = self._numbers, request._started
                self._numbers, request._started = number + 1, index + 1
                self._owners[number] = request, index
                key = candidate_key(request._key, index)
                about = (sampling.max_new_tokens, False, request.rewards, bool(sampling.stop), place, key)
                began.append((number, start, request._slot, len(request.prompt), 0, 0, *about))
            logits.append(request._logits.expand(len(request._reserved), -1))
            request._reserved = []
        return np.array(began, dtype=RUNNING), torch.cat(logits) if logits else None

    def _read_candidates(self) -> tuple[list[tuple[Request, Answer]], Tensor | None]:
        """Read the fresh tokens of all candidates; return the answers that ended, and the logits of the others [C, V].

        The candidates that ended, and those that pruning drops, are running no more.
        """
        running = self._running
        if not len(running):
            return [], None
        pruning = self._pruning()
        branches = np.zeros(len(running), np.int64)
        branches[list(pruning)] = 1
        queries = running["fresh"] + branches
        owner = np.repeat(np.arange(len(running)), queries)
        ends = queries.cumsum()  # of each candidate's queries
        mine = running[owner]
        place = mine["said"] - mine["fresh"] + np.arange(len(owner)) - np.repeat(ends - queries, queries)
        rows, total = mine["start"] + place, len(owner)
        tokens = np.where(place < mine["said"], self._token_at[rows], self.end)
        number = np.arange(total)
        table = np.stack(
            [
                number, number + 1, mine["start"], rows + 1, mine["prompt"], mine["prompt"] + mine["length"],
                mine["length"] + place,
            ],
            1,
        )  # fmt: skip
        padded = _padded_rows(total)
        rows = np.concatenate([rows, np.full(padded - total, self._scratch)])
        tokens = np.concatenate([tokens, np.full(padded - total, self.end)])
        layout = PackedLayout(torch.from_numpy(table), padded, 0, self.pool.rows)

        ending = np.flatnonzero(running["ending"])
        judged = np.flatnonzero(running["ending"] & running["rewards"] | branches.astype(bool))
        last, live = ends - 1 - branches, np.flatnonzero(~running["ending"])
        forced = np.concatenate([np.arange(last[i] - running[i]["fresh"] + 1, last[i]) for i in ending] or [ends[:0]])
        wanted = np.concatenate([last[live], forced])
        hidden, rewards, spreads = self._forward_judged(rows, layout, tokens, (ends - 1)[judged])
        logits = self._logits(hidden, wanted) if len(wanted) else hidden.new_empty(0, 0)
        if len(forced):
            self._keep_logprobs(rows[forced] + 1, logits[len(live) :], self._token_at[rows[forced] + 1])

        reward_of = {int(i): {head: values[j] for head, values in rewards.items()} for j, i in enumerate(judged)}
        spread_of = {int(i): {head: values[j] for head, values in spreads.items()} for j, i in enumerate(judged)}
        complete = [self._answer(i, True, reward_of.get(i, {}), spread_of.get(i, {})) for i in ending.tolist()]
        dropped = self._dropped(pruning, {i: reward_of[i] for i in pruning}, complete)
        complete += [self._answer(i, False, pruned=True) for i in dropped]
        gone = np.zeros(len(running), dtype=bool)
        gone[ending] = gone[dropped] = True
        self._remove(gone)
        kept = np.flatnonzero(~gone[live])
        if not len(kept):
            return complete, None
        return complete, logits[: len(live)] if len(kept) == len(live) else logits[torch.from_numpy(kept)]

    def _draw(self, logits: Tensor) -> None:
        """Draw and store the next tokens of all candidates from logits [C, V]."""
        running = self._running
        drawn = np.empty(len(running), np.int64)
        kinds = np.unique(running["sampling"])
        for kind in kinds:
            places = np.flatnonzero(running["sampling"] == kind)
            mine, sampling = running[places], self._samplings[kind]
            own = logits if len(kinds) == 1 else logits[torch.from_numpy(places)]
            seen = self._seen(mine).to(logits.device) if sampling.repetition_penalty != 1 else None
            drawn[places] = choose(own, sampling, mine["key"], mine["said"], seen).cpu().numpy()
        rows = running["start"] + running["said"]
        self._keep_logprobs(rows, logits, drawn)
        self._token_at[rows] = drawn
        running["said"] += 1
        running["fresh"] = 1
        running["ending"] = drawn == self.end

    def _seen(self, running: np.ndarray) -> Tensor:
        """Return the tokens [C, S] of prompts and answers, with the prompt's first in place of padding."""
        width = int((running["length"] + running["said"]).max())
        seen = np.repeat(self._token_at[running["prompt"]][:, None], width, 1)
        for row, (start, prompt, length, said) in zip(
            seen, running[["start", "prompt", "length", "said"]].tolist(), strict=True
        ):
            row[:length] = self._token_at[prompt : prompt + length]
            row[length : length + said] = self._token_at[start : start + said]
        return torch.from_numpy(seen)

    def _keep_logprobs(self, rows: np.ndarray, logits: Tensor, tokens: np.ndarray) -> None:
        """Store the log-probabilities of ``tokens`` [R], in these rows of the pool, after logits [R, V]."""
        chosen = logits.gather(1, to_device(torch.from_numpy(tokens), logits.device)[:, None]).squeeze(1)
        self._logprob_at[rows] = (chosen - logits.logsumexp(1)).cpu().numpy()

    def _sort_out(self) -> list[tuple[Request, Answer]]:
        """Return the answers that need no more reading: cut-off ones, and finished ones without rewards."""
        running, complete = self._running, []
        for i in np.flatnonzero(running["stops"] & ~running["ending"]).tolist():
            self._apply_stop(i, self._owners[int(running["number"][i])][0])
        ended = running["ending"] & (running["fresh"] == 1) & ~running["rewards"]
        cut_off = ~running["ending"] & (running["said"] >= running["limit"])
        for i in np.flatnonzero(ended | cut_off).tolist():
            complete.append(self._answer(i, bool(ended[i])))
        self._remove(ended | cut_off)
        return complete

    def _apply_stop(self, i: int, request: Request) -> None:
        """End a candidate before a stop text if it has just said one; its remaining tokens are read again."""
        start, said = (int(self._running[name][i]) for name in ("start", "said"))
        tokens = self._token_at[start : start + said].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        found = [place for stop in request.sampling.stop if (place := text.find(stop)) >= 0]
        if not found:
            return
        kept, text = said - 1, text[: min(found)]
        while not text.startswith(beginning := self.tokenizer.decode(tokens[:kept], skip_special_tokens=False)):
            kept -= 1
        forced = [*chat.plain(self.tokenizer)(text[len(beginning) :]), self.end]
        if kept + len(forced) > request.rows:
            raise UserError(f"stop: expected texts that cut no token into more than {STOP_ROOM}, got {len(forced)}")
        self._token_at[start + kept : start + kept + len(forced)] = forced
        read = max(kept - 1, 0)
        if not kept:
            first = np.array(forced[:1])
            self._keep_logprobs(np.array([start]), request._logits[None], first)
        running = self._running
        running["said"][i] = kept + len(forced)
        running["fresh"][i] = kept + len(forced) - read
        running["ending"][i] = True

    def _answer(
        self,
        i: int,
        finished: bool,
        rewards: dict[str, float] | None = None,
        spreads: dict[str, float] | None = None,
        pruned: bool = False,
    ) -> tuple[Request, Answer]:
        number, start, said = self._running[["number", "start", "said"]][i].tolist()
        request, index = self._owners[number]
        logprobs = self._logprob_at[start : start + said].astype(np.float64)
        content = logprobs[: said - finished]
        return request, Answer(
            index=index,
            tokens=tuple(self._token_at[start : start + said].tolist()),
            finished=finished,
            logprob=float(logprobs.sum()),
            mean_logprob=float(content.mean()) if len(content) else math.nan,
            rewards=rewards or {},
            spreads=spreads or {},
            pruned=pruned,
        )

    def _remove(self, gone: np.ndarray) -> None:
        """Remove candidates ``gone`` [C] and return their rows."""
        for number, start in self._running[gone][["number", "start"]].tolist():
            del self._owners[number]
            self.pool.free(start)
        self._running = self._running[~gone]

    # Pruning

    def _pruning(self) -> dict[int, Request]:
        """Return the candidates that are compared in this step: place in ``_running`` -> request."""
        compared = {}
        if any(request.pruning is not None for request in self.requests):
            for i, (number, said, ending) in enumerate(self._running[["number", "said", "ending"]].tolist()):
                request = self._owners[number][0]
                if request.pruning is not None and not ending and said % request.pruning.every == 0:
                    compared[i] = request
        return compared

    def _dropped(
        self,
        pruning: dict[int, Request],
        rewards: dict[int, dict[str, float]],
        complete: Sequence[tuple[Request, Answer]],
    ) -> list[int]:
        """Return which of the compared candidates are dropped, by their ``rewards`` if they ended here."""
        dropped: list[int] = []
        for request in dict.fromkeys(pruning.values()):
            head = request.pruning.head
            finished = [*request.answers, *(answer for owner, answer in complete if owner is request)]
            scores = [(answer.rewards[head], answer.index, None) for answer in finished if answer.finished]
            for i, owner in pruning.items():
                if owner is request:
                    index = self._owners[int(self._running["number"][i])][1]
                    scores.append((rewards[i][head], index, i))
            scores.sort(key=lambda score: (-score[0], score[1]))  # equal ones by number: NaN has no place anyway
            dropped += [i for _, _, i in scores[-(-len(scores) // 2) :] if i is not None]
        return dropped

    # The model

    def _forward(
        self, rows: np.ndarray, layout: PackedLayout, tokens: np.ndarray, *, decode: bool, **options: Any
    ) -> Any:
        device = self.model.device
        places = to_device(torch.from_numpy(rows), device)
        memory = self.pool.call(places, decode=decode)
        return self.model.backbone(to_device(torch.from_numpy(tokens), device), layout.to(device), memory, **options)

    def _forward_judged(
        self, rows: np.ndarray, layout: PackedLayout, tokens: np.ndarray, judged: np.ndarray
    ) -> tuple[Tensor, dict[str, list[float]], dict[str, list[float]]]:
        """Return the hidden states of a decoding call, and rewards and spreads by head of the ``judged`` rows."""
        if not len(judged):
            return self._forward(rows, layout, tokens, decode=True), {}, {}
        model = self.model
        places = to_device(torch.from_numpy(judged), model.device)
        observer = JudgedStates(model.heads.layers, len(model.backbone.blocks), itemgetter(places))
        hidden = self._forward(rows, layout, tokens, decode=True, observe=observer)
        rewards, spreads = {}, {}
        for head, values in model.rewards_of(observer.joined(), dropout=False, each=True).items():
            if values.dim() == 2:
                spreads[head] = values.std(1).tolist()
                values = values.mean(1)
            rewards[head] = values.tolist()
        return hidden, rewards, spreads

    def _logits(self, hidden: Tensor, rows: np.ndarray) -> Tensor:
        """Return the logits [R, V] fp32 after these rows of hidden states."""
        padded = np.concatenate([rows, np.repeat(rows[:1], _padded_rows(len(rows)) - len(rows))])
        states = hidden[to_device(torch.from_numpy(padded), hidden.device)]
        return self.model.lm_head(self.model.output_proj(states))[: len(rows)].float()


def _padded_rows(rows: int) -> int:
    """Return the number of rows that a product of matrices gets."""
    return max(-(-rows // ROW_MULTIPLE) * ROW_MULTIPLE, LEAST_ROWS)


class AttachedEngine(Engine):
    """One request after another, by the network's own cache, for models of ``dph.attach``; judged in a second pass."""

    def check(self, request: Request) -> None:
        """See :meth:`Engine.check`."""
        if request.pruning is not None:
            raise UserError("prune_every: expected a model of this package (dph.Model), got an attached one")

    def cancel(self, request: Request) -> None:
        """See :meth:`Engine.cancel`."""
        if request in self.requests:
            request.done = True
            self.requests.remove(request)

    @torch.no_grad()
    def step(self) -> list[tuple[Request, Answer]]:
        """Answer the first request, up to the end of its plan's round."""
        if not self.requests:
            return []
        request = self.requests[0]
        count = request._wanted - request._started
        sampled = self._sample(request, count)
        answers = self._judged(request, sampled)
        request._started += count
        for answer in answers:
            request._add(answer)
        if request.done:
            self.requests.remove(request)
        return [(request, answer) for answer in answers]

    def _sample(self, request: Request, count: int) -> list[list[int]]:
        """Return the tokens of the next ``count`` answers."""
        device, limit = self.model.device, request.sampling.max_new_tokens
        ids = torch.tensor([request.prompt], device=device)
        next_logits = self.model.decoder(ids, torch.ones_like(ids), limit, count)
        keys = np.stack([candidate_key(request._key, request._started + i) for i in range(count)])
        tokens, seen = ids[:, -1:].repeat_interleave(count, 0), ids.repeat_interleave(count, 0)
        answers: list[list[int]] = [[] for _ in range(count)]
        open_ones = set(range(count))
        for step in range(limit):
            logits = next_logits(tokens).float()
            chosen = choose(logits, request.sampling, keys, np.full(count, step), seen)
            tokens = chosen[:, None]
            seen = torch.cat([seen, tokens], 1)
            for i, token in enumerate(chosen.tolist()):
                if i in open_ones:
                    answers[i].append(token)
                    if token == self.end or self._stopped(answers[i], request.sampling.stop):
                        open_ones.discard(i)
            if not open_ones:
                break
        return answers

    def _stopped(self, answer: list[int], stops: Sequence[str]) -> bool:
        """End an answer before a stop text if it has said one; return whether."""
        if stops:
            text = self.tokenizer.decode(answer, skip_special_tokens=False)
            if found := [place for stop in stops if (place := text.find(stop)) >= 0]:
                answer[:] = [*chat.plain(self.tokenizer)(text[: min(found)]), self.end]
                return True
        return False

    def _judged(self, request: Request, sampled: Sequence[list[int]]) -> list[Answer]:
        group = [chat.continuation(request.prompt, tokens, self.tokenizer) for tokens in sampled]
        (judged,) = self.model.judge([group])
        answers = []
        for i, tokens in enumerate(sampled):
            finished, mean = tokens[-1:] == [self.end], judged.mean_logprobs[i]
            figures = [{}, {}]
            if finished and request.rewards:
                figures = [{head: own[i] for head, own in part.items()} for part in (judged.rewards, judged.spreads)]
            answers.append(
                Answer(
                    request._started + i, tuple(tokens), finished, judged.logprobs[i],
                    math.nan if mean is None else mean, *figures,
                )
            )  # fmt: skip
        return answers


def answer_all(model: JudgingModel, tokenizer: Any, requests: Sequence[Request]) -> Iterator[tuple[Request, Answer]]:
    """Yield the answers of all requests as they are completed."""
    engine = engine_for(model, tokenizer, requests)
    for request in requests:
        engine.submit(request)
    while engine.requests:
        yield from engine.step()
