"""The engine for models of this package: several answers to each of many prompts, continued together token by token.

A prompt is computed once, and all of its candidates read its keys and values; candidates that have said the same so far
are one. Candidates that end leave, and waiting ones take their place. The reward of an answer comes from the step that
reads its end-of-turn token, its log-probability from the logits that its tokens were drawn from: nothing is computed
twice.

An answer depends on its prompt, the seed and its number alone: on the CPU no other prompt or candidate changes a bit of
it (``dph_kernels.dispatch.batch_invariant``).

On a GPU, whose tokens take less time than the host's part in them, the host looks at the candidates only after every
``TURNS`` tokens (``TokenLoop``), while no prompt waits to be read and no option needs the host for each token.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dph import chat
from dph.errors import UserError
from dph.infer.choice import candidate_keys, choose
from dph.infer.prompt_reader import PromptReader
from dph.infer.request import STOP_ROOM, Answer, Engine, Request
from dph.infer.sampling import Sampling
from dph.infer.token_loop import LEAST_SIZE, TURNS, TokenLoop
from dph.infer.token_pool import TokenPool, padded_count
from dph.model.heads import JudgedStates, split_members
from dph.model.judging import JudgingModel
from dph_kernels.dispatch import batch_invariant
from dph_kernels.layout import PackedLayout
from dph_kernels.transfer import all_to_device, to_device

BATCH = 1024  # candidates that are continued together, and tokens of prompts that are read between two of their tokens
MOST_SAMPLINGS = 64  # before those that no candidate needs are dropped
MOST_LOOPS = 8  # kept, each with its CUDA graph


STATES = np.dtype(
    [
        ("request", "i8"),  # key of ``PromptReader.opened``
        ("start", "i8"),  # first row of its keys and values: that of one of its candidates
        ("prompt", "i8"),  # first row of the prompt
        ("length", "i8"),  # tokens of the prompt
        ("said", "i8"),  # tokens since; the last ``fresh`` have not been read
        ("fresh", "i8"),
        ("limit", "i8"),  # most tokens
        ("ending", "?"),  # whether the last token is the end of the turn
        ("rewards", "?"),  # whether that token is judged
        ("stops", "?"),  # whether there are stop texts
        ("sampling", "i8"),  # place in ``PooledEngine._samplings``
    ]
)
"""What candidates of one prompt have said that is the same."""

CANDIDATES = np.dtype([("index", "i8"), ("start", "i8"), ("state", "i8"), ("key", "i4", 2)])
"""Number among the prompt's answers, first row of its own, place in ``_states``, key of its noise."""


Figures = tuple[dict[str, float], dict[str, float]]
"""Rewards and spreads of an answer by head."""


class PooledEngine(Engine):
    """Continuous batching over a pool of keys and values.

    Args:
        model: with a backbone of this package.
        rows: of the pool; a prompt of P tokens and a candidate of at most N take P + 1 and N + 1.
        batch: candidates that are continued together at most.
        turns: tokens that are drawn between two looks of the host at most; None for ``TURNS`` on a GPU, else 1.
    """

    loop_type = TokenLoop

    def __init__(
        self, model: JudgingModel, tokenizer: Any, rows: int, batch: int = BATCH, turns: int | None = None
    ) -> None:
        super().__init__(model, tokenizer, chat.markup(tokenizer).end_of_turn)
        self.pool, self.batch = TokenPool(model, rows), batch
        self.turns = turns or (TURNS if model.device.type == "cuda" else 1)
        self._loops: dict[Hashable, TokenLoop] = {}  # the last one that was used comes last
        self.prompts = PromptReader(self.pool, batch)
        self._states, self._candidates = np.empty(0, STATES), np.empty(0, CANDIDATES)
        self._samplings: list[Sampling] = []

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
            self._drop(self._are_of(request))
            self._close(request)

    def partial(self, request: Request) -> dict[int, tuple[int, ...]]:
        """See :meth:`Engine.partial`."""
        tokens = {}
        for index, place in self._candidates[self._are_of(request)][["index", "state"]].tolist():
            start, said = self._states[["start", "said"]][place].tolist()
            tokens[index] = tuple(self.pool.tokens[start : start + said].tolist())
        return tokens

    @torch.no_grad()
    def step(self) -> list[tuple[Request, Answer]]:
        """Read the next tokens of all candidates, and of prompts that wait; draw a token, or several, for each."""
        self.prompts.admit(self.requests, len(self._candidates))
        with batch_invariant():
            if self._can_loop():
                complete = self._run_loop()
            else:
                self.prompts.read(self.requests)
                complete, logits = self._read_candidates()
                first = self._start()
                if len(self._states):
                    self._draw(torch.cat([part for part in (logits, first) if part is not None]))
        complete += self._sort_out()
        for request, answer in complete:
            request.add(answer)
        for request in [request for request in self.requests if request.done]:
            self._close(request)
        return complete

    def _are_of(self, request: Request) -> np.ndarray:
        """Return [C] whether a candidate is one of the request."""
        return self._states["request"][self._candidates["state"]] == request.number

    def _close(self, request: Request) -> None:
        """Remove a request whose candidates are gone."""
        request.done = True
        self.requests.remove(request)
        self.prompts.close(request)

    # Candidates

    def _start(self) -> Tensor | None:
        """Add the candidates that begin now, each prompt's as one state; return the logits [S, V] of their tokens."""
        if len(self._samplings) > MOST_SAMPLINGS:  # of all requests so far
            kinds, self._states["sampling"] = np.unique(self._states["sampling"], return_inverse=True)
            self._samplings = [self._samplings[kind] for kind in kinds]
        states, candidates, logits = [], [self._candidates], []
        for request in self.requests:
            count = len(request.reserved)
            if request.logits is None or not count:
                continue
            sampling = replace(request.sampling, max_new_tokens=1, stop=())  # of the choice, which these do not change
            if sampling not in self._samplings:
                self._samplings.append(sampling)
            own = np.empty(count, CANDIDATES)
            own["index"] = np.arange(request.started, request.started + count)
            own["start"], own["state"] = request.reserved, len(self._states) + len(states)
            own["key"] = candidate_keys(request.seed, request.prompt, own["index"])
            kind, options = self._samplings.index(sampling), (request.rewards, bool(request.sampling.stop))
            place = request.reserved[0], request.slot, len(request.prompt)
            states.append((request.number, *place, 0, 0, request.sampling.max_new_tokens, False, *options, kind))
            candidates.append(own)
            logits.append(request.logits)
            request.started += count
            request.reserved = []
        if not states:
            return None
        self._states = np.concatenate([self._states, np.array(states, STATES)])
        self._candidates = np.concatenate(candidates)
        return torch.stack(logits)

    def _read_candidates(self) -> tuple[list[tuple[Request, Answer]], Tensor | None]:
        """Read the fresh tokens of all states; return the answers that ended, and the logits of the others [S, V].

        The candidates that ended, and those that pruning drops, are gone.
        """
        states = self._states
        if not len(states):
            return [], None
        pruning = self._pruning()
        branches = np.zeros(len(states), np.int64)
        branches[list(pruning)] = 1
        queries = states["fresh"] + branches
        ends = queries.cumsum()  # of each state's queries
        mine = states[np.repeat(np.arange(len(states)), queries)]
        total = len(mine)
        place = mine["said"] - mine["fresh"] + np.arange(total) - np.repeat(ends - queries, queries)
        rows = mine["start"] + place
        tokens = np.where(place < mine["said"], self.pool.tokens[rows], self.end)
        layout = self._decode_layout(mine, place)
        padding = layout.queries - total
        padded_rows = np.concatenate([rows, np.full(padding, self.pool.padding)])
        tokens = np.concatenate([tokens, np.full(padding, self.end)])

        ending, live = np.flatnonzero(states["ending"]), np.flatnonzero(~states["ending"])
        judged = np.flatnonzero((states["ending"] & states["rewards"]) | (branches > 0))
        last = ends - 1 - branches
        forced = [np.arange(last[i] - states["fresh"][i] + 1, last[i]) for i in ending]  # their next tokens are known
        wanted = np.concatenate([last[live], *forced])
        hidden, figures = self._forward_judged(padded_rows, layout, tokens, judged, (ends - 1)[judged])
        logits = self.pool.logits(hidden, wanted) if len(wanted) else None
        if len(wanted) > len(live):
            known = rows[wanted[len(live) :]] + 1
            self.pool.keep_logprobs(known, logits[len(live) :], self.pool.tokens[known])

        complete = self._answers(ending, True, figures)
        gone = states["ending"][self._candidates["state"]]
        if pruning:
            dropped = self._weaker(pruning, figures, complete)
            complete += self._answers(live, False, {}, dropped)
            gone |= dropped
        is_left = np.bincount(self._candidates["state"][~gone], minlength=len(states))[live] > 0
        self._drop(gone)
        if not is_left.any():
            return complete, None
        return complete, logits[: len(live)] if is_left.all() else logits[torch.from_numpy(np.flatnonzero(is_left))]

    def _decode_layout(self, states: np.ndarray, place: np.ndarray) -> PackedLayout:
        """Return the layout of one query for each of ``states`` [T], the token with number ``place`` [T] after it."""
        number, first, prompt = np.arange(len(states)), states["start"], states["prompt"]
        columns = (
            number, number + 1, first, first + place + 1, prompt, prompt + states["length"], states["length"] + place
        )  # fmt: skip
        table = torch.from_numpy(np.stack(columns, 1))
        return PackedLayout(table, queries=padded_count(len(states)), keys=0, memory=self.pool.rows)

    def _draw(self, logits: Tensor) -> None:
        """Draw the next tokens of all candidates after logits [S, V]; those of a state that differ part ways."""
        states, candidates = self._states, self._candidates
        drawn = np.empty(len(candidates), np.int64)
        kinds = np.unique(states["sampling"])
        for kind in kinds:
            places, mine = np.arange(len(states)), np.arange(len(candidates))
            if len(kinds) > 1:
                places = np.flatnonzero(states["sampling"] == kind)
                mine = np.flatnonzero(states["sampling"][candidates["state"]] == kind)
            own, sampling = states[places], self._samplings[kind]
            owner = np.searchsorted(places, candidates["state"][mine])
            seen = to_device(self._seen(own), logits.device) if sampling.repetition_penalty != 1 else None
            some = logits if len(kinds) == 1 else logits[torch.from_numpy(places)]
            tables = [torch.from_numpy(table) for table in (candidates["key"][mine], own["said"][owner], owner)]
            drawn[mine] = choose(some, sampling, *all_to_device(tables, logits.device), seen).cpu().numpy()

        # Of the candidates that stay together one lends its rows: that which has done so, if it is among them.
        lends = candidates["start"] == states["start"][candidates["state"]]
        codes = candidates["state"] * logits.shape[1] + drawn
        order = np.argsort(~lends, kind="stable")
        distinct, first, together = np.unique(codes[order], return_index=True, return_inverse=True)
        parents, tokens = distinct // logits.shape[1], distinct % logits.shape[1]
        new = states[parents]
        new["start"] = candidates["start"][order[first]]
        self.pool.copy_ranges(states["start"][parents], new["start"], states["said"][parents])
        candidates["state"][order] = together
        rows = new["start"] + new["said"]
        self.pool.keep_logprobs(rows, logits, tokens, parents)
        self.pool.tokens[rows] = tokens
        new["said"] += 1
        new["fresh"] = 1
        new["ending"] = tokens == self.end
        self._states = new

    def _seen(self, states: np.ndarray) -> Tensor:
        """Return the tokens [S, L] of prompts and answers, with the prompt's first in place of padding."""
        width = int((states["length"] + states["said"]).max())
        seen = np.repeat(self.pool.tokens[states["prompt"]][:, None], width, 1)
        columns = states[["start", "prompt", "length", "said"]].tolist()
        for row, (start, prompt, length, said) in zip(seen, columns, strict=True):
            row[:length] = self.pool.tokens[prompt : prompt + length]
            row[length : length + said] = self.pool.tokens[start : start + said]
        return torch.from_numpy(seen)

    def _sort_out(self) -> list[tuple[Request, Answer]]:
        """Return the answers that need no more reading: cut-off ones, and finished ones without rewards."""
        for i in np.flatnonzero(self._states["stops"] & ~self._states["ending"]).tolist():
            self._apply_stop(i)
        states = self._states
        ended = states["ending"] & (states["fresh"] == 1) & ~states["rewards"]
        cut_off = ~states["ending"] & (states["said"] >= states["limit"])
        complete = self._answers(np.flatnonzero(ended), True, {}) + self._answers(np.flatnonzero(cut_off), False, {})
        self._drop((ended | cut_off)[self._candidates["state"]])
        return complete

    def _apply_stop(self, i: int) -> None:
        """End a state before a stop text if it has just said one; what remains of its last token is read again."""
        state = self._states[i]
        number, start, said = state[["request", "start", "said"]].tolist()
        request = self.prompts.opened[number]
        tokens = self.pool.tokens[start : start + said].tolist()
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        if (end := request.sampling.stop_place(text)) is None:
            return
        kept, text = said - 1, text[:end]
        while not text.startswith(beginning := self.tokenizer.decode(tokens[:kept], skip_special_tokens=False)):
            kept -= 1
        forced = [*chat.plain(self.tokenizer)(text[len(beginning) :]), self.end]
        if kept + len(forced) > request.rows:
            raise UserError(f"stop: expected texts that cut no token into more than {STOP_ROOM}, got {len(forced)}")
        self.pool.tokens[start + kept : start + kept + len(forced)] = forced
        if not kept:
            self.pool.keep_logprobs(np.array([start]), request.logits[None], np.array(forced[:1]))
        state["said"] = kept + len(forced)
        state["fresh"] = state["said"] - max(kept - 1, 0)  # the last kept one, for the log-probability of the next
        state["ending"] = True

    def _answers(
        self,
        places: np.ndarray,
        finished: bool,
        figures: Mapping[int, Figures],
        dropped: np.ndarray | None = None,
    ) -> list[tuple[Request, Answer]]:
        """Return the answers of the states at ``places``, with rewards and spreads; of ``dropped`` [C] ones alone."""
        if not len(places):
            return []
        candidates = self._candidates if dropped is None else self._candidates[dropped]
        candidates = candidates[np.argsort(candidates["state"], kind="stable")]
        firsts, lasts = (np.searchsorted(candidates["state"], places, side).tolist() for side in ("left", "right"))
        indices = candidates["index"].tolist()
        said = self._states["said"][places]
        ends = said.cumsum()
        rows = np.repeat(self._states["start"][places] - ends + said, said) + np.arange(ends[-1])
        tokens, logprobs = self.pool.tokens[rows].tolist(), self.pool.logprobs[rows].astype(np.float64)
        totals = np.add.reduceat(logprobs, ends - said)  # every candidate has said something
        of_content, count = (totals - logprobs[ends - 1], said - 1) if finished else (totals, said)
        means = np.divide(of_content, count, out=np.full(len(said), math.nan), where=count > 0)
        columns = (places, firsts, lasts, self._states["request"][places], ends - said, ends, totals, means)
        answers = []
        for i, first, last, number, begin, end, total, mean in zip(
            *(column if isinstance(column, list) else column.tolist() for column in columns), strict=True
        ):
            request, own = self.prompts.opened[number], figures.get(i, ({}, {}))
            words = tuple(tokens[begin:end])
            for index in indices[first:last]:
                answer = Answer(index, words, finished, total, mean, *own, pruned=dropped is not None)
                answers.append((request, answer))
        return answers

    def _drop(self, gone: np.ndarray) -> None:
        """Remove candidates ``gone`` [C], return their rows, and remove states without candidates."""
        if not gone.any():
            return
        states, candidates = self._states, self._candidates
        left = np.bincount(candidates["state"][~gone], minlength=len(states))
        lends = candidates["start"] == states["start"][candidates["state"]]
        for i in np.flatnonzero(gone & lends & (left[candidates["state"]] > 0)):  # another one takes its rows over
            heir = np.flatnonzero(~gone & (candidates["state"] == candidates["state"][i]))[0]
            candidates["start"][[i, heir]] = candidates["start"][[heir, i]]
        for start in candidates["start"][gone].tolist():
            self.pool.free(start)
        self._states, self._candidates = states[left > 0], candidates[~gone]
        self._candidates["state"] = ((left > 0).cumsum() - 1)[self._candidates["state"]]

    # Several tokens at once

    def _can_loop(self) -> bool:
        """Whether the next tokens of all candidates can be drawn without the host, and no prompt waits for it."""
        states = self._states
        if self.turns == 1 or not len(states) or (states["fresh"] > 1).any() or states["stops"].any():
            return False
        if (states["sampling"] != states["sampling"][0]).any():
            return False
        if self._samplings[states["sampling"][0]].repetition_penalty != 1:
            return False
        return all(not request.reserved and request.pruning is None for request in self.prompts.opened.values())

    def _run_loop(self) -> list[tuple[Request, Answer]]:
        """Draw several tokens of all candidates; return the answers that ended."""
        self._part()
        states, candidates = self._states, self._candidates
        keys = np.empty((len(states), 2), np.int32)
        keys[candidates["state"]] = candidates["key"]
        drawn = self._loop().run(states, keys)

        ends = drawn.count.cumsum()
        turn = np.arange(ends[-1]) - np.repeat(ends - drawn.count, drawn.count)
        column = np.repeat(np.arange(len(states)), drawn.count)
        rows = (states["start"] + states["said"])[column] + turn
        self.pool.tokens[rows], self.pool.logprobs[rows] = drawn.tokens[turn, column], drawn.logprobs[turn, column]
        states["said"] += drawn.count
        states["ending"] = self.pool.tokens[states["start"] + states["said"] - 1] == self.end

        judged = np.flatnonzero(drawn.read_end & states["rewards"])
        figures = self._figures(judged, drawn.judged[to_device(torch.from_numpy(judged), self.model.device)])
        complete = self._answers(np.flatnonzero(drawn.read_end), True, figures)
        self._drop(drawn.read_end[candidates["state"]])
        return complete

    def _part(self) -> None:
        """Give each candidate a state of its own."""
        states, candidates = self._states, self._candidates
        shared, own = states[candidates["state"]], candidates["start"]
        self.pool.copy_ranges(shared["start"], own, shared["said"])
        shared["start"] = own
        candidates["state"] = np.arange(len(candidates))
        self._states = shared

    def _loop(self) -> TokenLoop:
        """Return the loop for the present candidates."""
        sampling, layers = self._samplings[self._states["sampling"][0]], self.model.heads.layers
        size = max(1 << (len(self._states) - 1).bit_length(), LEAST_SIZE)
        key = (size, sampling, *layers)
        loop = self._loops.pop(key, None)
        if loop is None:
            loop = self.loop_type(self.pool, self.model, self.end, sampling, size, self.turns)
            if self._loops:  # one runs at a time, and none keeps a result in the memory of its graph
                loop.graph_pool = next(iter(self._loops.values())).graph_pool
        self._loops[key] = loop
        if len(self._loops) > MOST_LOOPS:
            del self._loops[next(iter(self._loops))]
        return loop

    # Pruning

    def _pruning(self) -> dict[int, Request]:
        """Return the states that are compared in this step, by place, and their requests."""
        compared = {}
        if any(request.pruning is not None for request in self.prompts.opened.values()):
            for i, (number, said, ending) in enumerate(self._states[["request", "said", "ending"]].tolist()):
                request = self.prompts.opened[number]
                if request.pruning is not None and not ending and said % request.pruning.every == 0:
                    compared[i] = request
        return compared

    def _weaker(
        self,
        pruning: Mapping[int, Request],
        figures: Mapping[int, Figures],
        complete: Sequence[tuple[Request, Answer]],
    ) -> np.ndarray:
        """Return [C] whether a candidate is in the weaker half of its prompt's, by the rewards of ``pruning``."""
        dropped = np.zeros(len(self._candidates), dtype=bool)
        for request in dict.fromkeys(pruning.values()):
            head = request.pruning.head
            finished = [*request.answers, *(answer for owner, answer in complete if owner is request)]
            scores = [(answer.rewards[head], answer.index, None) for answer in finished if answer.finished]
            for j, (index, place) in enumerate(self._candidates[["index", "state"]].tolist()):
                if pruning.get(place) is request:
                    scores.append((figures[place][0][head], index, j))
            scores.sort(key=lambda score: (-score[0], score[1]))
            dropped[[j for _, _, j in scores[-(-len(scores) // 2) :] if j is not None]] = True
        return dropped

    # The model

    def _forward_judged(
        self, rows: np.ndarray, layout: PackedLayout, tokens: np.ndarray, places: np.ndarray, judged: np.ndarray
    ) -> tuple[Tensor, dict[int, Figures]]:
        """Return the hidden states of a decoding call, and by ``places`` [A] the figures of the ``judged`` [A] rows."""
        if not len(judged):
            return self.pool.forward(rows, layout, tokens, decode=True), {}
        model = self.model
        select = itemgetter(to_device(torch.from_numpy(judged), model.device))
        observer = JudgedStates(model.heads.layers, len(model.backbone.blocks), select)
        hidden = self.pool.forward(rows, layout, tokens, decode=True, observe=observer)
        return hidden, self._figures(places, observer.joined())

    def _figures(self, places: np.ndarray, judged: Tensor) -> dict[int, Figures]:
        """Return by ``places`` [A] the figures of judged states [A, N C]."""
        if not len(places):
            return {}
        rewards, members = split_members(self.model.rewards_of(judged, dropout=False, each=True))
        spreads = {head: values.std(1).tolist() for head, values in members.items()}
        rewards, figures = {head: values.tolist() for head, values in rewards.items()}, {}
        for j, place in enumerate(places.tolist()):
            figures[place] = tuple({head: values[j] for head, values in part.items()} for part in (rewards, spreads))
        return figures
