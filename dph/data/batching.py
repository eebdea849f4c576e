"""What training takes: segments of parallel streams, and preference pairs. Both resume exactly from plain JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dph.chat import Encoded
from dph.data.formats import Record
from dph.data.packing import packed_length
from dph.data.sampler import Order
from dph.errors import UserError
from dph.losses import IGNORED


class Streams:
    """Segments for Transformer-XL training: B parallel streams, each of records end to end, cut every S tokens.

    Iterating yields (tokens [B, S], targets [B, S]), int64 on the CPU; a target is -100 where the loss mask is off.
    Row b of a batch goes on where row b of the batch before ended, so that memory carries records across the cut. A
    stream takes whole runs of ``records.run``. Where the records end, what is left is filled up with ``pad_token``.
    """

    def __init__(
        self, records: Order, encode: Callable[[Record], Encoded], batch: int, length: int, pad_token: int
    ) -> None:
        if batch < 1 or length < 1:
            raise UserError(f"batch, length: expected at least 1 each, got {batch} and {length}")
        self.records, self.encode, self.length, self.pad_token = records, encode, length, pad_token
        self._tokens: list[list[int]] = [[] for _ in range(batch)]
        self._targets: list[list[int]] = [[] for _ in range(batch)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Itself."""
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next segment of every stream."""
        for tokens, targets in zip(self._tokens, self._targets, strict=True):
            self._fill(tokens, targets)
        if not any(self._tokens):
            raise StopIteration
        return self._take(self._tokens, self.pad_token), self._take(self._targets, IGNORED)

    def _fill(self, tokens: list[int], targets: list[int]) -> None:
        while len(tokens) < self.length:
            for _ in range(self.records.run):
                record = next(self.records, None)
                if record is None:
                    return
                encoded = self.encode(record)
                tokens += encoded.tokens
                masked = zip(encoded.targets, encoded.loss_mask, strict=True)
                targets += [target if on else IGNORED for target, on in masked]

    def _take(self, streams: list[list[int]], filler: int) -> Tensor:
        rows = []
        for stream in streams:
            rows.append(stream[: self.length] + [filler] * (self.length - len(stream)))
            del stream[: self.length]
        return torch.tensor(rows, dtype=torch.int64)

    def state_dict(self) -> dict[str, Any]:
        """The records' state, and the tokens that every stream has left over."""
        copy = [list(stream) for stream in self._tokens], [list(stream) for stream in self._targets]
        return {"records": self.records.state_dict(), "tokens": copy[0], "targets": copy[1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Raises UserError where the batch size is another."""
        if len(state["tokens"]) != len(self._tokens):
            raise UserError(f"batch: expected the interrupted run's {len(state['tokens'])}, got {len(self._tokens)}")
        self.records.load_state_dict(state["records"])
        self._tokens = [list(stream) for stream in state["tokens"]]
        self._targets = [list(stream) for stream in state["targets"]]


class PairBatches:
    """Lists of N (chosen, rejected), encoded; the last one is shorter where the records end.

    A pair is left out whole, and counted in ``refused`` by reason, where a side is longer than ``max_length`` tokens
    (a cut answer has no reward), where it takes more than ``max_tokens`` with its prompt shared, where both sides are
    the same, or where the record has no wrong answer.
    """

    def __init__(
        self,
        records: Order,
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
        """Itself."""
        return self

    def __next__(self) -> list[tuple[Encoded, Encoded]]:
        """The next N pairs. Raises UserError where no record of two whole passes gives a pair."""
        found, in_a_row = [], 0
        while len(found) < self.pairs:
            try:
                record = next(self.records)
            except StopIteration:
                break
            pair = self.encode(record) if record is not None else None
            reason = self._reason(pair)
            if reason is None:
                found.append(pair)
                in_a_row = 0
                continue
            self.refused[reason] += 1
            in_a_row += 1
            if in_a_row > 2 * self.records.size:
                reasons = ", ".join(f"{reason} ({count})" for reason, count in self.refused.items())
                raise UserError(f"pairs: expected some to train on, got none in two passes over the records: {reasons}")
        if not found:
            raise StopIteration
        return found

    def _reason(self, pair: tuple[Encoded, Encoded] | None) -> str | None:
        """Why a pair is refused, or None."""
        if pair is None:
            return "no wrong answer"
        if pair[0].tokens == pair[1].tokens:
            return "identical"
        if self.max_length is not None and max(map(len, pair)) > self.max_length:
            return f"longer than {self.max_length} tokens"
        # What is shared need not be looked for where there is room for both sides whole.
        most = self.max_tokens
        if most is not None and sum(map(len, pair)) > most and packed_length(pair) > most:
            return f"more than {most} tokens together"
        return None

    def state_dict(self) -> dict[str, Any]:
        """The records' state, and what was refused so far."""
        return {"records": self.records.state_dict(), "refused": dict(self.refused)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.records.load_state_dict(state["records"])
        self.refused = Counter(state["refused"])
