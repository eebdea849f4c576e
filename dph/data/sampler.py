"""The order of records: one pass, shuffled epochs without end, several sources interleaved. States are plain JSON.

What comes next depends on the seed and on how many records came before, and on nothing else.
"""

from __future__ import annotations

import random
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any, Protocol

from dph.data.formats import Record
from dph.errors import UserError

Place = tuple[int, int]  # of a record: which source, which index in it


def draw(n: int, *key: str | int) -> int:
    """A number below ``n``, uniform over keys, and always the same for the same key."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") * n >> 64


class Order(Protocol):
    """Records one after another, with a state from which the rest follows again."""

    size: int  # records in one pass
    run: int  # consecutive records that belong together

    def __next__(self) -> Record | None:
        """The next record."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as plain JSON."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand there again."""


class Drawn(Order, Protocol):
    """An order that can say which record comes next without reading it, and so be run ahead of what is taken."""

    @property
    def lists(self) -> list[Sequence[Record]]:
        """The records of each source."""

    def advance(self) -> Place:
        """Step over the next record, and say where it is. Raises StopIteration after the last."""

    def state_dict(self, ahead: Sequence[Place] = ()) -> dict[str, Any]:
        """Where it stands, or stood before it stepped over the places ``ahead``."""


class InOrder:
    """One pass over ``source`` as it lies, for evaluation."""

    run = 1

    def __init__(self, source: Sequence[Record]) -> None:
        self.source, self.position = source, 0

    @property
    def size(self) -> int:
        """Records in one pass."""
        return len(self.source)

    def __iter__(self) -> Iterator[Record]:
        """Itself."""
        return self

    def __next__(self) -> Record:
        """The next record, until there is none."""
        return self.source[self.advance()[1]]

    @property
    def lists(self) -> list[Sequence[Record]]:
        """The one source."""
        return [self.source]

    def advance(self) -> Place:
        """Step over the next record, and say where it is. Raises StopIteration after the last."""
        if self.position >= self.size:
            raise StopIteration
        self.position += 1
        return 0, self.index(self.position - 1)

    def index(self, position: int) -> int:
        """Where in the source the record at a position of the pass is."""
        return position

    def state_dict(self, ahead: Sequence[Place] = ()) -> dict[str, int]:
        """The position before ``ahead``, and the size that it holds for."""
        return {"position": self.position - len(ahead), "size": self.size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Stand at a position. Raises UserError where the source is not the one that it was taken from."""
        if state["size"] != self.size:
            raise UserError(f"data: expected the {state['size']} records of the interrupted run, got {self.size}")
        self.position = state["position"]


class Shuffled(InOrder):
    """``source`` without end, each epoch in an order of its own; the state is one counter. Not thread-safe."""

    def __init__(self, source: Sequence[Record], seed: int) -> None:
        if not len(source):
            raise UserError("source: expected at least one record, got none")
        super().__init__(source)
        self.seed = seed
        self._epoch, self._order = -1, array("q")

    def advance(self) -> Place:
        """Step over the next record, and say where it is; there always is one."""
        self.position += 1
        return 0, self.index(self.position - 1)

    def index(self, position: int) -> int:
        """Where in the source the record at a position of the endless sequence is."""
        epoch, index = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, array("q", range(self.size))
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
        return self._order[index]


class Interleaved:
    """``run`` consecutive records of one source, then of another one drawn, and so on.

    The draw is uniform, or in proportion to ``weights``.
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
        self._shares = list(accumulate(weights))

    @property
    def size(self) -> int:
        """Records of all sources together."""
        return sum(source.size for source in self.sources)

    def __iter__(self) -> Iterator[Record]:
        """Itself."""
        return self

    def __next__(self) -> Record:
        """The next record; there always is one."""
        which, index = self.advance()
        return self.sources[which].source[index]

    @property
    def lists(self) -> list[Sequence[Record]]:
        """The records of each source."""
        return [source.source for source in self.sources]

    def advance(self) -> Place:
        """Step over the next record, and say where it is; there always is one."""
        point = draw(2**52, self.seed, self.position // self.run) / 2**52 * self._shares[-1]
        which = bisect_right(self._shares, point)
        self.position += 1
        return which, self.sources[which].advance()[1]

    def state_dict(self, ahead: Sequence[Place] = ()) -> dict[str, Any]:
        """The position, and every source's state, before ``ahead``."""
        of: list[list[Place]] = [[] for _ in self.sources]
        for place in ahead:
            of[place[0]].append(place)
        states = [source.state_dict(places) for source, places in zip(self.sources, of, strict=True)]
        return {"position": self.position - len(ahead), "sources": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand at a position. Raises UserError where the sources are not those that it was taken from."""
        if len(state["sources"]) != len(self.sources):
            raise UserError(
                f"data: expected the {len(state['sources'])} sources of the interrupted run, got {len(self.sources)}"
            )
        for source, saved in zip(self.sources, state["sources"], strict=True):
            source.load_state_dict(saved)
        self.position = state["position"]
