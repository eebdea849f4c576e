"""Ring buffers offloaded to pinned host memory, with copies that overlap with the device's computation."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dph.model.kv_ring import RingBuffers, Rows


class Span(NamedTuple):
    """Rows that are contiguous both in a ring and in another tensor (a window, or the rows of a call).

    Attributes:
        ring, other: index of the first row in each.
        rows: their number.
    """

    ring: int
    other: int
    rows: int


class HostRingBuffers(RingBuffers):
    """Pinned buffers [2, B, M, ...] on the host; the device holds the windows [B * M, ...] of two layers.

    A buffer has room for 2 M rows of a stream, so that a call's rows are written to slots that the call does not read:
    nothing waits for ``commit``, and gradient checkpointing reads the old rows again. Each half has the layout of a
    buffer on the device. If all streams are at a multiple of M, as with segments of M tokens, a window is one half and
    one copy.

    A layer's window is prefetched while the layer before it computes (in the backward pass: the layer after it), and
    its new rows are written back while the next layer computes.
    """

    def __init__(self, length: int, tensors: int) -> None:
        super().__init__(length, tensors)
        self._skipped: list[int] = []  # tokens of each stream that were not stored: those before the last M of a call
        self._windows: dict[int, Rows] = {}  # of the layer that computes and of the next one
        self._window_spans: list[Span] = []
        self._new_spans: list[Span] = []
        self._device: torch.device | None = None

    def begin(self, seen: list[int], counts: list[int]) -> None:
        """See :class:`RingBuffers`."""
        super().begin(seen, counts)
        self._skipped = self._skipped or [0] * len(seen)
        self._join()  # a call that failed may have left copies
        self._window_spans, self._new_spans = self._window(seen), self._new_rows()

    def read(self, layer: int, like: Tensor) -> Rows:
        """Return a copy of the window, and start to prefetch that of the next layer."""
        if like.device != self._device:
            self._device = like.device
            self._prefetch, self._write_back = CopyStream(like.device), CopyStream(like.device)
        if layer == len(self._layers):
            size = (2 * len(self._seen) * self.length, *like.shape[1:])
            self._layers.append(tuple(pinned(size, like.dtype) for _ in range(self.tensors)))
        if layer not in self._windows:
            self._windows[layer] = self._fetch(layer)
        self._prefetch.join()
        self._windows = {layer: self._windows[layer]}
        following = layer + (1 if self.in_call else -1)
        if 0 <= following < len(self._layers):
            self._windows[following] = self._fetch(following)
        return self._windows[layer]

    def _fetch(self, layer: int) -> Rows:
        rings, rows = self._layers[layer], len(self._seen) * self.length
        full = sum(span.rows for span in self._window_spans) == rows
        allocate = torch.empty if full else torch.zeros  # kernels may load masked rows, which have to be finite
        windows = tuple(allocate((rows, *ring.shape[1:]), dtype=ring.dtype, device=self._device) for ring in rings)
        copies = []
        for ring_rows, window_rows in _pairs(self._window_spans, rings, windows):
            copies.append((window_rows, ring_rows))
        self._prefetch.submit(copies)
        return windows

    def store(self, layer: int, rows: Rows) -> None:
        """Start to write; waits for the rows of the layer before, whose memory can then be freed."""
        self._write_back.join()
        rings = self._layers[layer]
        sources = []
        for tensor, ring in zip(rows, rings, strict=True):
            sources.append(tensor.to(ring.dtype).contiguous())
        self._write_back.submit(list(_pairs(self._new_spans, rings, tuple(sources))))

    def commit(self) -> bool:
        """Count the rows of the last call; there is nothing to copy."""
        if not super().commit():
            return False
        self._join()
        for b, count in enumerate(self._counts):
            self._skipped[b] += max(count - self.length, 0)
        return True

    def _join(self) -> None:
        if self._device is not None:
            self._prefetch.join()
            self._write_back.join()
        self._windows = {}

    def _window(self, seen: list[int]) -> list[Span]:
        """Spans of the last M rows of each stream and their slots in [B * M]."""
        spans: list[Span] = []
        for b, position in enumerate(seen):
            start = max(position - self.length, 0)
            spans += self._cut(b, start - self._skipped[b], position - start, b * self.length, start, self.length)
        return _merged(spans)

    def _new_rows(self) -> list[Span]:
        """Spans of the last M rows of each stream in the call and their indices among the call's rows [T]."""
        spans: list[Span] = []
        end = 0
        for b, (seen, count) in enumerate(zip(self._seen, self._counts, strict=True)):
            end, rows = end + count, min(count, self.length)
            spans += self._cut(b, seen - self._skipped[b], rows, end - rows, 0, rows)
        return _merged(spans)

    def _cut(self, b: int, stored: int, rows: int, base: int, start: int, period: int) -> Iterator[Span]:
        """Yield the spans of ``rows`` rows of stream ``b``.

        In the ring they follow the first ``stored`` rows of the stream, at a period of 2 M. In the other tensor they
        begin at ``base + start``, and ``start`` has the period ``period``.
        """
        done = 0
        while done < rows:
            half, slot = divmod(stored + done, self.length)
            other = (start + done) % period
            size = min(rows - done, self.length - slot, period - other)
            yield Span((half % 2 * len(self._skipped) + b) * self.length + slot, base + other, size)
            done += size

    def state(self, seen: list[int]) -> list[Rows]:
        """Return the windows: a view of each buffer if the window is one span, else a copy."""
        self._synchronize()
        spans, layers = self._window(seen), []
        for rings in self._layers:
            layers.append(tuple(self._gather(ring, spans) for ring in rings))
        return layers

    def _gather(self, ring: Tensor, spans: list[Span]) -> Tensor:
        rows = len(self._skipped) * self.length
        if len(spans) == 1 and spans[0].rows == rows:
            window = ring[spans[0].ring : spans[0].ring + rows]
        else:
            window = ring.new_zeros((rows, *ring.shape[1:]))
            for ring_rows, window_rows in _pairs(spans, (ring,), (window,)):
                window_rows.copy_(ring_rows)
        return window.view(len(self._skipped), self.length, *ring.shape[1:])

    def load(self, layers: list[Rows], seen: list[int]) -> None:
        """See :class:`RingBuffers`."""
        self._skipped = [0] * len(seen)
        spans = self._window(seen)
        for tensors in layers:
            windows = tuple(window.flatten(0, 1) for window in tensors)
            rings = tuple(pinned((2 * len(window), *window.shape[1:]), window.dtype) for window in windows)
            for ring_rows, window_rows in _pairs(spans, rings, windows):
                ring_rows.copy_(window_rows)
            self._layers.append(rings)

    def select(self, indices: Tensor) -> None:
        """See :class:`RingBuffers`."""
        self._synchronize()
        streams, indices = len(self._skipped), indices.cpu()
        for layer, rings in enumerate(self._layers):
            self._layers[layer] = tuple(self._selected(ring, streams, indices) for ring in rings)
        self._skipped = [self._skipped[i] for i in indices.tolist()]

    def _selected(self, ring: Tensor, streams: int, indices: Tensor) -> Tensor:
        selected = pinned((2 * len(indices) * self.length, *ring.shape[1:]), ring.dtype)
        sizes = self.length, *ring.shape[1:]
        torch.index_select(ring.view(2, streams, *sizes), 1, indices, out=selected.view(2, len(indices), *sizes))
        return selected

    def _synchronize(self) -> None:
        """Block the host until all copies have ended."""
        self._join()
        if self._device is not None:
            self._write_back.synchronize()


def _merged(spans: list[Span]) -> list[Span]:
    """The same rows with adjacent spans joined."""
    merged = spans[:1]
    for span in spans[1:]:
        last = merged[-1]
        if (last.ring + last.rows, last.other + last.rows) == (span.ring, span.other):
            merged[-1] = last._replace(rows=last.rows + span.rows)
        else:
            merged.append(span)
    return merged


def _pairs(spans: list[Span], rings: Rows, others: Rows) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of each span in each ring and in the tensor that belongs to it."""
    for ring, other in zip(rings, others, strict=True):
        for span in spans:
            yield ring[span.ring : span.ring + span.rows], other[span.other : span.other + span.rows]


def pinned(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the host, pinned if there is a GPU. Raises MemoryError if the host cannot hold them."""
    try:
        with torch.inference_mode(False):
            return torch.zeros(size, dtype=dtype, pin_memory=torch.cuda.is_available())
    except RuntimeError as error:
        needed = math.prod(size) * dtype.itemsize
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        raise MemoryError(
            f"memory: expected {needed / 1e9:,.2f} GB of the host's memory for a layer's ring, got "
            f"{physical / 1e9:,.2f} GB at most ({str(error).splitlines()[0]})"
        ) from error


class CopyStream:
    """Copies in one direction on a CUDA stream of their own; on a CPU they are done at once.

    ``submit`` orders copies after all earlier work of the device's current stream, ``join`` orders all later work of
    that stream after the copies. The tensors are referenced until then, so that their memory is reused in the order of
    the current stream. With ``record_stream`` it would stay allocated until the host, which runs ahead, polls again.
    """

    def __init__(self, device: torch.device) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def submit(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        """Start copies (target, source), each contiguous on both sides."""
        if self._stream is None:
            for target, source in copies:
                target.copy_(source)
            return
        self._held += copies
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)

    def join(self) -> None:
        """Let the device's current stream wait for the copies; the host does not wait."""
        if self._held:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._held = []

    def synchronize(self) -> None:
        """Block the host until the copies have ended."""
        self.join()
        if self._stream is not None:
            self._stream.synchronize()

    def __del__(self) -> None:
        """Memory that unfinished copies use must not be reused before they end."""
        self.join()
