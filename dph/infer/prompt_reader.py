"""Prompts of the engine: they take rows, copy beginnings that others have read, and are read in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dph.infer.token_pool import TokenPool, padded_count
from dph_kernels.layout import PackedLayout

if TYPE_CHECKING:
    from dph.infer.request import Request

CHUNK = 512  # tokens of a prompt that are read at once; a multiple of attention's blocks, counted from its beginning
BEGINNING = 64  # tokens of the beginnings that prompts share, in multiples: the keys that attention reads at once


class PromptReader:
    """The prompts that have rows of a pool.

    Args:
        pool: of the prompts and their candidates.
        batch: tokens that are read in one call, to the end of the last chunk; and candidates at most.

    Attributes:
        opened: number -> request, of those whose prompts have rows.
    """

    def __init__(self, pool: TokenPool, batch: int) -> None:
        self.pool, self.batch = pool, batch
        self.opened: dict[int, Request] = {}
        self._beginnings: dict[int, list[Request]] = {}  # hash of a prompt's first blocks -> opened requests
        self._numbers = 0

    def admit(self, requests: Sequence[Request], running: int) -> None:
        """Take rows for candidates of the prompts that are there, then for further prompts, first come first served.

        ``running``: candidates that have started.
        """
        room = self.batch - running - sum(len(request.reserved) for request in requests)
        is_full = False
        for request in requests:
            if request.slot is None:
                is_full = is_full or not self._open(request, room)
            else:
                request.reserved += self._take(request, request.slot, room)
            room -= len(request.reserved)

    def _open(self, request: Request, room: int) -> bool:
        """Take rows for a prompt and candidates that start with it; return whether there were enough."""
        slot = self.pool.take(len(request.prompt))
        if slot is None:
            return False
        if not (taken := self._take(request, slot, room)):
            self.pool.free(slot)
            return False
        request.slot, request.reserved, request.number = slot, taken, self._numbers
        self.opened[self._numbers] = request
        for beginning in _beginnings(request.prompt):
            self._beginnings.setdefault(beginning, []).append(request)
        self._numbers += 1
        self.pool.tokens[slot : slot + len(request.prompt)] = request.prompt
        return True

    def _take(self, request: Request, slot: int, room: int) -> list[int]:
        """Return the first rows of waiting candidates, at most ``room``; none if too few can start together.

        They lie behind the prompt's: attention adds up the parts in the order of the rows. The last prompt of the pool
        has only candidates behind it, which end, and there was room for one of its own: some prompt can always go on.
        """
        waiting = request.wanted - request.started - len(request.reserved)
        taken: list[int] = []
        while len(taken) < min(waiting, room) and (start := self.pool.take(request.rows, slot)) is not None:
            taken.append(start)
        if request.pruning is not None and len(taken) < waiting:
            for start in taken:
                self.pool.free(start)
            return []
        return taken

    def read(self, requests: Sequence[Request]) -> None:
        """Read a chunk of each prompt, up to the tokens of a batch, and keep the logits after the complete ones."""
        chunks: list[tuple[Request, int]] = []  # with numbers of tokens
        budget = self.batch
        for request in requests:
            if request.slot is None or budget <= 0 or request.read == len(request.prompt):
                continue
            if not request.read and not self._copy_beginning(request, [chunk for chunk, _ in chunks]):
                continue
            count = min(CHUNK - request.read % CHUNK, len(request.prompt) - request.read)
            chunks.append((request, count))
            budget -= count
        if not chunks:
            return
        table, rows, complete, start = [], [], [], 0
        for request, count in chunks:
            slot, read, end = request.slot, request.read, start + count
            table.append((start, end, self.pool.rows + start, self.pool.rows + end, slot, slot + read, read))
            rows.append(np.arange(slot + read, slot + read + count))
            request.read = read + count
            if request.read == len(request.prompt):
                complete.append((request, end - 1))
            start = end
        padded = padded_count(start)
        rows = np.concatenate([*rows, np.full(padded - start, self.pool.padding)])
        layout = PackedLayout(torch.tensor(table), padded, padded, self.pool.rows)
        hidden = self.pool.forward(rows, layout, self.pool.tokens[rows], decode=False)
        if complete:
            logits = self.pool.logits(hidden, np.array([row for _, row in complete]))
            for (request, _), own in zip(complete, logits, strict=True):
                request.logits = own.clone()

    def _copy_beginning(self, request: Request, reading: Sequence[Request]) -> bool:
        """Copy the keys and values of the longest beginning that another prompt has read.

        Returns False if one of those that are being ``reading`` has a longer one, which is there at the next step.
        """
        blocks = _beginnings(request.prompt)
        for count in range(len(blocks), 0, -1):
            others = [other for other in self._beginnings[blocks[count - 1]] if other is not request]
            rows = count * BEGINNING
            donor = next((other for other in others if other.read >= rows), None)
            if donor is not None and donor.prompt[:rows] == request.prompt[:rows]:
                self.pool.copy_ranges(*(np.array([value]) for value in (donor.slot, request.slot, rows)))
                request.read = rows
                return True
            if any(other in reading for other in others):
                return False
        return True

    def close(self, request: Request) -> None:
        """Return the rows of a prompt, if it has any, and of its candidates that have not started."""
        for start in request.reserved:
            self.pool.free(start)
        if request.slot is not None:
            for beginning in _beginnings(request.prompt):
                self._beginnings[beginning].remove(request)
                if not self._beginnings[beginning]:
                    del self._beginnings[beginning]
            self.pool.free(request.slot)
            del self.opened[request.number]
        request.slot, request.logits, request.reserved = None, None, []


def _beginnings(prompt: tuple[int, ...]) -> list[int]:
    """Return hashes of the beginnings of a prompt of 1, 2, ... blocks, as far as another one may copy them.

    The last block is left out: attention may compute the last rows of a prompt, which are few, in another way.
    """
    hashes, value = [], 0
    for end in range(BEGINNING, len(prompt) - BEGINNING + 1, BEGINNING):
        value = hash((value, prompt[end - BEGINNING : end]))
        hashes.append(value)
    return hashes
