"""Batches of language modelling: segments of parallel streams (their state is plain JSON), and whole documents."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dph.chat import Encoded
from dph.data.formats import Record, Text
from dph.data.sampler import Sampler
from dph.errors import UserError
from dph.losses import IGNORED

WINDOW = 16  # groups of documents that are sorted by length together


class Streams:
    """Segments for Transformer-XL training: B parallel streams, each of records end to end, cut every S tokens.

    Iterating yields (tokens [B, S], targets [B, S]), int64 on the CPU; a target is -100 if its loss mask is off. Row b
    of a batch continues row b of the previous batch, so that memory carries records across the cut. A stream takes
    whole runs of ``records.run``, which ``encode_run`` encodes together if it is given. After the last record the
    streams are padded with ``pad_token``.
    """

    def __init__(
        self,
        records: Sampler,
        encode: Callable[[Record], Encoded],
        batch: int,
        length: int,
        pad_token: int,
        encode_run: Callable[[list[Record]], Encoded] | None = None,
    ) -> None:
        if batch < 1 or length < 1:
            raise UserError(f"batch, length: expected at least 1 each, got {batch} and {length}")
        self.records, self.encode, self.length, self.pad_token = records, encode, length, pad_token
        self.encode_run = encode_run
        self._tokens: list[list[int]] = [[] for _ in range(batch)]  # of each stream, beyond the segments taken
        self._targets: list[list[int]] = [[] for _ in range(batch)]
        # The last batch, for ``undo``: records and tokens of every stream before it, and its segments once cut.
        self._position: int | None = None
        self._lengths: list[int] = []
        self._segments: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the iterator itself."""
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return the next segment of every stream. Raises StopIteration when all streams are empty."""
        self._position, self._lengths, self._segments = self.records.position, list(map(len, self._tokens)), None
        for tokens, targets in zip(self._tokens, self._targets, strict=True):
            self._fill(tokens, targets)
        if not any(self._tokens):
            raise StopIteration
        self._segments = self._take(self._tokens, self.pad_token), self._take(self._targets, IGNORED)
        return self._segments

    def undo(self) -> dict[str, Any]:
        """Return the state before the last batch, which may have failed; this object must not be used afterwards."""
        for number, streams in enumerate((self._tokens, self._targets)):
            for row, stream in enumerate(streams):
                if self._segments is not None:
                    stream[:0] = self._segments[number][row].tolist()
                del stream[self._lengths[row] :]
        return self._state(self._position)

    def _fill(self, tokens: list[int], targets: list[int]) -> None:
        """Add runs of records to one stream until it holds a segment or the records end."""
        while len(tokens) < self.length:
            run = list(itertools.islice(self.records, self.records.run))
            if not run:
                return
            for encoded in map(self.encode, run) if self.encode_run is None else (self.encode_run(run),):
                tokens += encoded.tokens
                targets += _targets(encoded)

    def _take(self, streams: list[list[int]], padding: int) -> Tensor:
        """Remove a segment from each stream, padded to the full length: [B, S]."""
        rows = []
        for stream in streams:
            rows.append(stream[: self.length] + [padding] * (self.length - len(stream)))
            del stream[: self.length]
        return torch.tensor(rows, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state and the remaining tokens of every stream."""
        return self._state(None)

    def _state(self, position: int | None) -> dict[str, Any]:
        tokens, targets = [list(stream) for stream in self._tokens], [list(stream) for stream in self._targets]
        return {"records": self.records.state_dict(position), "tokens": tokens, "targets": targets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises UserError if it has another batch size."""
        if len(state["tokens"]) != len(self._tokens):
            raise UserError(f"batch: expected the interrupted run's {len(state['tokens'])}, got {len(self._tokens)}")
        self.records.load_state_dict(state["records"])
        self._tokens = [list(stream) for stream in state["tokens"]]
        self._targets = [list(stream) for stream in state["targets"]]


Document = tuple[list[int], list[int]]  # tokens, and as many targets, -100 if the loss mask is off


def documents(records: Iterable[Record], encode: Callable[[Record], Encoded]) -> Iterator[Document]:
    """Yield every document; the records of a text that continues in the next one are joined."""
    tokens, targets = [], []
    for record in records:
        encoded = encode(record)
        tokens += encoded.tokens
        targets += _targets(encoded)
        if not (isinstance(record, Text) and record.continues):
            yield tokens, targets
            tokens, targets = [], []
    if tokens:  # the last text is cut, as by a limit
        yield tokens, targets


def similar_lengths(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Yield groups of ``size`` documents, the longest first, of a window of ``WINDOW`` groups sorted by length."""
    waiting = iter(documents)
    while window := list(itertools.islice(waiting, WINDOW * size)):
        window.sort(key=lambda document: -len(document[0]))
        for start in range(0, len(window), size):
            yield window[start : start + size]


def padded(rows: list[list[int]], padding: int) -> Tensor:
    """Return rows [B, S] int64 of the length of the first one, padded at the end."""
    length = len(rows[0])
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows], dtype=torch.int64)


def _targets(encoded: Encoded) -> list[int]:
    """Return the targets, -100 if the loss mask is off."""
    targets = []
    for target, counted in zip(encoded.targets, encoded.loss_mask, strict=True):
        targets.append(target if counted else IGNORED)
    return targets
