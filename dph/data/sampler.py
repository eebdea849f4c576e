"""Samplers of records: one pass, endless shuffled epochs, several sources interleaved. Their states are plain JSON.

The next record depends only on the seed and on the number of records taken so far.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Protocol

from dph.errors import UserError

Item = Any  # an element of a data set, of any kind
RecordIndex = tuple[int, int, int]  # number of the source, index of the record in it, earlier visits of the record


def draw(n: int, *key: str | int) -> int:
    """Return a pseudorandom integer below ``n``, uniform over keys and the same for the same key."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") * n >> 64


def read(records: Sequence[Item], index: int, visit: int) -> Item | None:
    """Return a record at a visit, counted from 0: records with a method ``at_visit`` may differ from visit to visit."""
    at_visit = getattr(records, "at_visit", None)
    return records[index] if at_visit is None else at_visit(index, visit)


def evenly_spaced(size: int, count: int) -> list[int]:
    """Return at most ``count`` indices below ``size``, the first and the last among them if there are several."""
    count = min(size, count)
    return [i * (size - 1) // max(count - 1, 1) for i in range(count)]


class Sampler(Protocol):
    """Iterator over records that continues exactly from its state."""

    size: int  # records in one pass
    run: int  # consecutive records of one source
    position: int  # records taken so far

    def __next__(self) -> Item | None:
        """Return the next record; None is a pair without a wrong answer."""

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Return the state as plain JSON; with ``position``, the one after the first ``position`` records."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""


class IndexSampler(Sampler, Protocol):
    """Sampler that draws the index of the next record without reading the record, so that it can be prefetched."""

    @property
    def datasets(self) -> list[Sequence[Item]]:
        """Records of each source."""

    def next_index(self) -> RecordIndex:
        """Advance by one record and return its index. Raises StopIteration after the last."""


class InOrder:
    """One pass over ``source`` in its order, for evaluation."""

    run = 1

    def __init__(self, source: Sequence[Item]) -> None:
        self.source, self.size, self.position = source, len(source), 0

    def __iter__(self) -> Iterator[Item | None]:
        """Return the sampler itself."""
        return self

    def __next__(self) -> Item | None:
        """Return the next record. Raises StopIteration after the last."""
        _, index, visit = self.next_index()
        return read(self.source, index, visit)

    @property
    def datasets(self) -> list[Sequence[Item]]:
        """The one source."""
        return [self.source]

    def next_index(self) -> RecordIndex:
        """Advance by one record and return its index. Raises StopIteration after the last."""
        if self.position >= self.size:
            raise StopIteration
        self.position += 1
        return 0, self.position - 1, 0

    def state_dict(self, position: int | None = None) -> dict[str, int]:
        """Return the position, or an earlier ``position``, and the size of the source."""
        return {"position": self.position if position is None else position, "size": self.size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a state. Raises UserError if the state belongs to a source of another size."""
        if state["size"] != self.size:
            raise UserError(f"data: expected the {state['size']} records of the interrupted run, got {self.size}")
        self.position = state["position"]


class Shuffled(InOrder):
    """Endless epochs over ``source``, each in an order of its own; the state is one counter. Not thread-safe."""

    def __init__(self, source: Sequence[Item], seed: int) -> None:
        if not len(source):
            raise UserError("source: expected at least one record, got none")
        super().__init__(source)
        self.seed = seed
        self._epoch, self._permutation = -1, array("q")

    def next_index(self) -> RecordIndex:
        """Advance by one record and return its index."""
        self.position += 1
        return 0, self.index(self.position - 1), (self.position - 1) // self.size

    def index(self, position: int) -> int:
        """Return the index in the source of the record at ``position`` of the endless sequence."""
        epoch, index = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, array("q", range(self.size))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._permutation)
        return self._permutation[index]


class Interleaved:
    """``run`` consecutive records of one source, then of another source, and so on without end.

    Sources are drawn uniformly, or in proportion to ``weights``.
    """

    def __init__(
        self, sources: Sequence[Shuffled], seed: int, run: int = 5, weights: Sequence[float] | None = None
    ) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if not sources:
            raise UserError("sources: expected at least one, got none")
        if run < 1:
            raise UserError(f"run: expected at least 1, got {run}")
        if len(weights) != len(sources) or min(weights) < 0 or sum(weights) <= 0:
            raise UserError(f"weights: expected {len(sources)} that are not negative and not all 0, got {weights}")
        self.sources, self.seed, self.run, self.position = list(sources), seed, run, 0
        self.size, self.weights = sum(source.size for source in sources), weights
        self._cumulative_weights = list(accumulate(weights))

    def __iter__(self) -> Iterator[Item | None]:
        """Return the sampler itself."""
        return self

    def __next__(self) -> Item | None:
        """Return the next record."""
        number, index, visit = self.next_index()
        return read(self.sources[number].source, index, visit)

    @property
    def datasets(self) -> list[Sequence[Item]]:
        """Records of each source."""
        return [source.source for source in self.sources]

    def next_index(self) -> RecordIndex:
        """Advance by one record and return its index."""
        number = self._source_at(self.position)
        source = self.sources[number]
        index, visit = source.index(source.position), source.position // source.size
        source.position += 1
        self.position += 1
        return number, index, visit

    def _source_at(self, position: int) -> int:
        """Return the number of the source of the record at ``position`` of the endless sequence."""
        point = draw(2**52, self.seed, position // self.run) / 2**52 * self._cumulative_weights[-1]
        return bisect_right(self._cumulative_weights, point)

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Return the position, or an earlier ``position``, and the state of every source there."""
        position = self.position if position is None else position
        positions = [source.position for source in self.sources]
        for later in range(position, self.position):
            positions[self._source_at(later)] -= 1
        states = [source.state_dict(own) for source, own in zip(self.sources, positions, strict=True)]
        return {"position": position, "sources": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. Raises UserError if the state belongs to other sources."""
        if len(state["sources"]) != len(self.sources):
            raise UserError(
                f"data: expected the {len(state['sources'])} sources of the interrupted run, got {len(self.sources)}"
            )
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        self.position = state["position"]
