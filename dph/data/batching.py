"""Batches for training: segments of parallel streams, and preference pairs. Both continue exactly from plain JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dph.chat import Encoded
from dph.data.formats import Record
from dph.data.packing import packed_length
from dph.data.sampler import Sampler
from dph.errors import UserError
from dph.losses import IGNORED


class Streams:
    """Segments for Transformer-XL training: B parallel streams, each of records end to end, cut every S tokens.

    Iterating yields (tokens [B, S], targets [B, S]), int64 on the CPU; a target is -100 if its loss mask is off. Row b
    of a batch continues row b of the previous batch, so that memory carries records across the cut. A stream takes
    whole runs of ``records.run``. After the last record the streams are padded with ``pad_token``.
    """

    def __init__(
        self, records: Sampler, encode: Callable[[Record], Encoded], batch: int, length: int, pad_token: int
    ) -> None:
        if batch < 1 or length < 1:
            raise UserError(f"batch, length: expected at least 1 each, got {batch} and {length}")
        self.records, self.encode, self.length, self.pad_token = records, encode, length, pad_token
        self._tokens: list[list[int]] = [[] for _ in range(batch)]  # of each stream, beyond the segments taken
        self._targets: list[list[int]] = [[] for _ in range(batch)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the iterator itself."""
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return the next segment of every stream. Raises StopIteration when all streams are empty."""
        for tokens, targets in zip(self._tokens, self._targets, strict=True):
            self._fill(tokens, targets)
        if not any(self._tokens):
            raise StopIteration
        return self._take(self._tokens, self.pad_token), self._take(self._targets, IGNORED)

    def _fill(self, tokens: list[int], targets: list[int]) -> None:
        """Add runs of records to one stream until it holds a segment or the records end."""
        while len(tokens) < self.length:
            for _ in range(self.records.run):
                record = next(self.records, None)
                if record is None:
                    return
                encoded = self.encode(record)
                tokens += encoded.tokens
                for target, counted in zip(encoded.targets, encoded.loss_mask, strict=True):
                    targets.append(target if counted else IGNORED)

    def _take(self, streams: list[list[int]], padding: int) -> Tensor:
        """Remove a segment from each stream, padded to the full length: [B, S]."""
        rows = []
        for stream in streams:
            rows.append(stream[: self.length] + [padding] * (self.length - len(stream)))
            del stream[: self.length]
        return torch.tensor(rows, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state and the remaining tokens of every stream."""
        tokens, targets = [list(stream) for stream in self._tokens], [list(stream) for stream in self._targets]
        return {"records": self.records.state_dict(), "tokens": tokens, "targets": targets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises UserError if it has another batch size."""
        if len(state["tokens"]) != len(self._tokens):
            raise UserError(f"batch: expected the interrupted run's {len(state['tokens'])}, got {len(self._tokens)}")
        self.records.load_state_dict(state["records"])
        self._tokens = [list(stream) for stream in state["tokens"]]
        self._targets = [list(stream) for stream in state["targets"]]


class PairBatches:
    """Lists of N encoded pairs (chosen, rejected); the last one is shorter if the records end.

    A pair is left out, and counted in ``refused`` by its reason, if a side is longer than ``max_length`` tokens (a cut
    answer has no reward), if the pair takes more than ``max_tokens`` with its prompt shared, if both sides are the
    same, or if the record has no wrong answer.
    """

    def __init__(
        self,
        records: Sampler,
        encode: Callable[[Record], tuple[Encoded, Encoded]],
        pairs: int,
        max_length: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        if pairs < 1:
            raise UserError(f"pairs: expected at least 1, got {pairs}")
        self.records, self.encode, self.pairs = records, encode, pairs
        self.max_length, self.max_tokens = max_length, max_tokens
        self.refused: Counter[str] = Counter()

    def __iter__(self) -> Iterator[list[tuple[Encoded, Encoded]]]:
        """Return the iterator itself."""
        return self

    def __next__(self) -> list[tuple[Encoded, Encoded]]:
        """Return the next N pairs. Raises UserError if two whole passes over the records give no pair."""
        batch, refused_in_a_row = [], 0
        while len(batch) < self.pairs:
            try:
                record = next(self.records)
            except StopIteration:
                break
            pair = None if record is None else self.encode(record)
            reason = self._reason_to_refuse(pair)
            if reason is None:
                batch.append(pair)
                refused_in_a_row = 0
                continue
            self.refused[reason] += 1
            refused_in_a_row += 1
            if refused_in_a_row > 2 * self.records.size:
                reasons = ", ".join(f"{reason} ({count})" for reason, count in self.refused.items())
                raise UserError(f"pairs: expected some to train on, got none in two passes over the records: {reasons}")
        if not batch:
            raise StopIteration
        return batch

    def _reason_to_refuse(self, pair: tuple[Encoded, Encoded] | None) -> str | None:
        """Return the reason why a pair is left out, or None."""
        if pair is None:
            return "no wrong answer"
        chosen, rejected = pair[0].tokens, pair[1].tokens
        if chosen == rejected:
            return "identical"
        if self.max_length is not None and max(len(chosen), len(rejected)) > self.max_length:
            return f"longer than {self.max_length} tokens"
        # The common prefix is searched only if both sides in full exceed the limit.
        limit = self.max_tokens
        if limit is not None and len(chosen) + len(rejected) > limit and packed_length(pair) > limit:
            return f"more than {limit} tokens together"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state and the counts of refused pairs."""
        return {"records": self.records.state_dict(), "refused": dict(self.refused)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        self.records.load_state_dict(state["records"])
        self.refused = Counter(state["refused"])
