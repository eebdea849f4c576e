"""Keys and values of many sequences that are continued together, in one pool of rows.

The prompts of best-of-N sampling and their candidates each own a range of rows, their slot; all candidates of a prompt
read its rows, which are there once.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Rows = tuple[Tensor, Tensor]  # keys, values


class KVPool:
    """``rows`` rows of keys and values for each layer, allocated once; keys are stored rotated.

    Ranges are given out by ``take`` and returned by ``free``. Between two of them lies a row that nobody reads: ranges
    that touch would be read in blocks across their border, and rounded accordingly.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._layers: list[Rows] = []
        self._gaps: list[tuple[int, int]] = [(0, rows)]  # free ranges [start, end), rising
        self._taken: dict[int, int] = {}  # start -> end

    def take(self, rows: int) -> int | None:
        """Return the first row of a range of ``rows`` rows that is now taken; None if none is free."""
        for i, (start, end) in enumerate(self._gaps):
            if end - start > rows:
                self._gaps[i : i + 1] = [(start + rows + 1, end)] if end - start > rows + 1 else []
                self._taken[start] = start + rows + 1
                return start
        return None

    def free(self, start: int) -> None:
        """Return the range that begins at row ``start``."""
        end = self._taken.pop(start)
        place = bisect.bisect(self._gaps, (start, end))
        if place < len(self._gaps) and self._gaps[place][0] == end:
            end = self._gaps.pop(place)[1]
        if place and self._gaps[place - 1][1] == start:
            start = self._gaps.pop(place - 1)[0]
            place -= 1
        self._gaps.insert(place, (start, end))

    def call(self, rows: Tensor, *, decode: bool) -> Callable[[int], PoolLayer]:
        """Return a function from a layer's number to its view for a call whose tokens own ``rows`` [T].

        ``decode``: its queries find the keys of all tokens in the pool, those of the call too.
        """
        return lambda layer: PoolLayer(self, layer, rows, decode)

    def buffers(self, layer: int, like: Tensor) -> Rows:
        """Return keys and values of a layer, allocated with rows of the shape and dtype of those of ``like``."""
        if layer == len(self._layers):
            size = (self.rows, *like.shape[1:])
            # A GPU's kernels multiply rows that nobody sees by zero: these have to be finite.
            make = like.new_empty if like.device.type == "cpu" else like.new_zeros
            self._layers.append((make(size), make(size)))
        return self._layers[layer]

    def copy(self, sources: Tensor, targets: Tensor) -> None:
        """Copy rows ``sources`` [R] of all layers to ``targets`` [R]."""
        for buffers in self._layers:
            for buffer in buffers:
                buffer.index_copy_(0, targets, buffer[sources])


@dataclass(frozen=True)
class PoolLayer:
    """View of one layer of a :class:`KVPool` for one call, as a block's memory."""

    pool: KVPool
    layer: int
    rows: Tensor
    decode: bool

    kind = "pool"

    def read(self, like: Tensor) -> Rows:
        """Return the pool's rows [M, K, D]."""
        return self.pool.buffers(self.layer, like)

    def keep(self, *rows: Tensor) -> None:
        """Store keys and values [T, K, D] of the call."""
        for buffer, values in zip(self.pool.buffers(self.layer, rows[0]), rows, strict=True):
            buffer.index_copy_(0, self.rows, values)
