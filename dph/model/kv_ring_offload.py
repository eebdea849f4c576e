"""A memory's rows in pinned memory of the host, with copies that run beside the device's computing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dph import devices
from dph.model.kv_ring import Rings, Rows


class Span(NamedTuple):
    """Rows that lie together both in a ring and in a window, or among a call's rows: the first of each, how many."""

    ring: int
    other: int
    rows: int


class HostRings(Rings):
    """Pinned rings [2, B, M, ...] on the host, and on the device no more than a part that computes has to see.

    A ring has room for 2 M rows of a stream, so a call's rows go where the call does not read: nothing waits for
    ``commit``, and gradient checkpointing finds the old rows. Each half lies as a ring on the device does; where all
    streams stand at a multiple of M, as they do when a segment has M tokens, a window is one half, and one copy.

    A layer's window is fetched while the layer before it computes (in the backward pass the layer behind it), and its
    new rows are written while the next one computes.
    """

    def __init__(self, length: int, parts: int) -> None:
        super().__init__(length, parts)
        self._skipped: list[int] = []  # tokens of each stream that no ring took, as their call brought more than M
        self._windows: dict[int, Rows] = {}  # of the layer that computes and of the one that comes next
        self._read: list[Span] = []
        self._written: list[Span] = []
        self._device: torch.device | None = None

    def begin(self, seen: list[int], counts: list[int]) -> None:
        """See :class:`Rings`."""
        super().begin(seen, counts)
        self._skipped = self._skipped or [0] * len(seen)
        self._join()  # a call that failed may have left copies
        self._read, self._written = self._window(seen), self._new_rows()

    def read(self, layer: int, like: Tensor) -> Rows:
        """A copy of the window; that of the layer which comes next is begun."""
        self._use(like.device)
        if layer == len(self._layers):
            size = (2 * len(self._seen) * self.length, *like.shape[1:])
            self._layers.append(tuple(pinned(size, like.dtype) for _ in range(self.parts)))
        if layer not in self._windows:
            self._windows[layer] = self._fetch(layer)
        self._fetching.join()
        self._windows = {layer: self._windows[layer]}
        following = layer + (1 if self.under_way else -1)
        if 0 <= following < len(self._layers):
            self._windows[following] = self._fetch(following)
        return self._windows[layer]

    def _use(self, device: torch.device) -> None:
        if device != self._device:
            self._device, self._fetching, self._writing = device, Lane(device), Lane(device)

    def _fetch(self, layer: int) -> Rows:
        rings, rows = self._layers[layer], len(self._seen) * self.length
        full = sum(span.rows for span in self._read) == rows
        make = torch.empty if full else torch.zeros  # a kernel may load what it masks: let it be finite
        windows = tuple(make((rows, *r.shape[1:]), dtype=r.dtype, device=self._device) for r in rings)
        self._fetching.start([(window, ring) for ring, window in _paired(self._read, rings, windows)])
        return windows

    def keep(self, layer: int, rows: Rows) -> None:
        """Begin to write; the layer before has been written, or is waited for, so that its rows can go."""
        self._writing.join()
        rings = self._layers[layer]
        rows = tuple(r.to(ring.dtype).contiguous() for r, ring in zip(rows, rings, strict=True))
        self._writing.start(list(_paired(self._written, rings, rows)))

    def commit(self) -> bool:
        """Nothing is left to be moved."""
        if not super().commit():
            return False
        self._join()
        self._skipped = [s + max(n - self.length, 0) for s, n in zip(self._skipped, self._counts, strict=True)]
        return True

    def _join(self) -> None:
        if self._device is not None:
            self._fetching.join()
            self._writing.join()
        self._windows = {}

    def _window(self, seen: list[int]) -> list[Span]:
        """The last M rows of every stream, and their slots in [B * M]."""
        found: list[Span] = []
        for b, position in enumerate(seen):
            first = max(position - self.length, 0)
            place = first - self._skipped[b]
            found += self._cut(b, place, position - first, b * self.length, first, self.length)
        return _merged(found)

    def _new_rows(self) -> list[Span]:
        """The last M rows that the call brings of every stream, and their numbers among its rows [T]."""
        found: list[Span] = []
        end = 0
        for b, (seen, count) in enumerate(zip(self._seen, self._counts, strict=True)):
            end, rows = end + count, min(count, self.length)
            found += self._cut(b, seen - self._skipped[b], rows, end - rows, 0, rows)
        return _merged(found)

    def _cut(self, b: int, place: int, rows: int, base: int, first: int, turn: int) -> Iterator[Span]:
        """The spans of ``rows`` rows of stream ``b``.

        In the ring they begin at ``place``, which counts the rows that the stream has left there and turns every 2 M;
        elsewhere at ``base + first``, where ``first`` turns every ``turn``.
        """
        done = 0
        while done < rows:
            half, slot = divmod(place + done, self.length)
            other = (first + done) % turn
            size = min(rows - done, self.length - slot, turn - other)
            start = (half % 2 * len(self._skipped) + b) * self.length + slot
            yield Span(start, base + other, size)
            done += size

    def state(self, seen: list[int]) -> list[Rows]:
        """The windows: a view of each ring where it is one span, else a copy."""
        self._finish()
        spans = self._window(seen)
        return [tuple(self._gathered(ring, spans) for ring in rings) for rings in self._layers]

    def _gathered(self, ring: Tensor, spans: list[Span]) -> Tensor:
        rows = len(self._skipped) * self.length
        if [span.rows for span in spans] == [rows]:
            window = ring[spans[0].ring : spans[0].ring + rows]
        else:
            window = ring.new_zeros((rows, *ring.shape[1:]))
            for source, to in _paired(spans, (ring,), (window,)):
                to.copy_(source)
        return window.view(len(self._skipped), self.length, *ring.shape[1:])

    def load(self, layers: list[Rows], seen: list[int]) -> None:
        """See :class:`Rings`."""
        self._skipped = [0] * len(seen)
        spans = self._window(seen)
        for windows in layers:
            windows = tuple(window.flatten(0, 1) for window in windows)
            rings = tuple(pinned((2 * len(w), *w.shape[1:]), w.dtype) for w in windows)
            for to, source in _paired(spans, rings, windows):
                to.copy_(source)
            self._layers.append(rings)

    def select(self, indices: Tensor) -> None:
        """See :class:`Rings`."""
        self._finish()
        streams, indices = len(self._skipped), indices.cpu()
        self._layers = [tuple(self._selected(ring, streams, indices) for ring in rings) for rings in self._layers]
        self._skipped = [self._skipped[i] for i in indices.tolist()]

    def _selected(self, ring: Tensor, streams: int, indices: Tensor) -> Tensor:
        selected = pinned((2 * len(indices) * self.length, *ring.shape[1:]), ring.dtype)
        sizes = self.length, *ring.shape[1:]
        torch.index_select(ring.view(2, streams, *sizes), 1, indices, out=selected.view(2, len(indices), *sizes))
        return selected

    def _finish(self) -> None:
        """Let the host wait for all copies."""
        self._join()
        if self._device is not None:
            self._writing.finish()


def _merged(spans: list[Span]) -> list[Span]:
    """The same rows in as few spans as may be."""
    merged = spans[:1]
    for span in spans[1:]:
        last = merged[-1]
        if (last.ring + last.rows, last.other + last.rows) == (span.ring, span.other):
            merged[-1] = last._replace(rows=last.rows + span.rows)
        else:
            merged.append(span)
    return merged


def _paired(spans: list[Span], rings: Rows, others: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of every span, in each ring and in what belongs to it."""
    for ring, other in zip(rings, others, strict=True):
        for span in spans:
            yield ring[span.ring : span.ring + span.rows], other[span.other : span.other + span.rows]


def pinned(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the host, pinned where there is a GPU. Raises MemoryError where the host has no room for them."""
    try:
        with torch.inference_mode(False):
            return torch.zeros(size, dtype=dtype, pin_memory=torch.cuda.is_available())
    except RuntimeError as error:
        needed = math.prod(size) * dtype.itemsize
        raise MemoryError(
            f"memory: expected {needed / 1e9:,.2f} GB of the host's memory for a layer's ring, got "
            f"{devices.host_memory() / 1e9:,.2f} GB at most ({str(error).splitlines()[0]})"
        ) from error


class Lane:
    """Copies in one direction, in their order, beside what a GPU computes; on a CPU they are done at once.

    ``start`` puts them behind all that the device's current stream was given before, ``join`` puts all that it is given
    later behind them. Till then their tensors are held, so that memory is used again in that stream's order alone; with
    ``record_stream`` it would stay taken until the host, which runs ahead, looks again.
    """

    def __init__(self, device: torch.device) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        """Begin copies (to, from), each contiguous on both sides."""
        if self._stream is None:
            for to, source in copies:
                to.copy_(source)
            return
        self._held += copies
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for to, source in copies:
                to.copy_(source, non_blocking=True)

    def join(self) -> None:
        """See :class:`Lane`; the host does not wait."""
        if self._held:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._held = []

    def finish(self) -> None:
        """The host waits."""
        self.join()
        if self._stream is not None:
            self._stream.synchronize()

    def __del__(self) -> None:
        """What is dropped half way must not be written by what comes."""
        self.join()
