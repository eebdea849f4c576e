"""Ring buffers of a memory: their interface, and the ones on the model's device.

``dph.model.kv_ring_offload`` has those in host memory. All of them return the same rows in the same order, so that no
result depends on where they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from dph_kernels.transfer import to_device

Rows = tuple[Tensor, ...]  # (keys, values), or (attention inputs,)


class RingBuffers(ABC):
    """Ring buffers of all layers and streams; the token at position p of a stream is in slot p % M.

    A call of the model is ``begin``, ``read`` and ``store`` for each layer, ``end``. The rows of a call become visible
    to the next one with ``commit``. A call that never ends changes nothing.

    Args:
        length: M.
        tensors: tensors of a layer: 2 for keys and values, 1 for attention inputs.

    Attributes:
        in_call: between ``begin`` and ``end``.
    """

    def __init__(self, length: int, tensors: int) -> None:
        self.length, self.tensors = length, tensors
        self.in_call = False
        self._layers: list[Rows] = []
        self._uncommitted = False
        self._seen: list[int] = []  # tokens of each stream before the last call
        self._counts: list[int] = []  # tokens of each stream in the last call

    def begin(self, seen: list[int], counts: list[int]) -> None:
        """Start a call with ``counts`` [B] tokens of streams that have seen ``seen`` [B]."""
        self._seen, self._counts, self.in_call = seen, counts, True

    @abstractmethod
    def read(self, layer: int, like: Tensor) -> Rows:
        """Return the rows [B * M, ...] of a layer that the call sees, on the device of ``like`` [*, ...].

        The first read of a layer allocates its buffers, with rows of the shape and dtype of those of ``like``.
        """

    @abstractmethod
    def store(self, layer: int, rows: Rows) -> None:
        """Take the rows [T, ...] of a layer in the call."""

    def end(self) -> None:
        """End the call, after all of its layers are stored."""
        self.in_call, self._uncommitted = False, True

    def commit(self) -> bool:
        """Make the rows of the last call visible; return whether they were not already."""
        uncommitted, self._uncommitted = self._uncommitted, False
        return uncommitted

    @abstractmethod
    def state(self, seen: list[int]) -> list[Rows]:
        """Return each layer as [B, M, ...], after ``commit``; the tensors may share storage with the buffers."""

    @abstractmethod
    def load(self, layers: list[Rows], seen: list[int]) -> None:
        """Copy the result of ``state`` into empty buffers."""

    @abstractmethod
    def select(self, indices: Tensor) -> None:
        """Keep the streams ``indices`` [B'], in that order, after ``commit``."""

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._layers)


class DeviceRingBuffers(RingBuffers):
    """Buffers [B, M, ...] on the model's device; a call's rows wait for ``commit``, as they overwrite what it reads."""

    def __init__(self, length: int, tensors: int) -> None:
        super().__init__(length, tensors)
        self._pending: dict[int, Rows] = {}

    def begin(self, seen: list[int], counts: list[int]) -> None:
        """See :class:`RingBuffers`."""
        super().begin(seen, counts)
        self._pending = {}

    def read(self, layer: int, like: Tensor) -> Rows:
        """Return views of the buffers."""
        if layer == len(self._layers):
            size = (len(self._seen), self.length, *like.shape[1:])
            with torch.inference_mode(False):  # buffers that inference mode allocates may be written in training
                self._layers.append(tuple(like.new_zeros(size) for _ in range(self.tensors)))
        return tuple(ring.flatten(0, 1) for ring in self._layers[layer])

    def store(self, layer: int, rows: Rows) -> None:
        """See :class:`RingBuffers`."""
        self._pending[layer] = rows

    def commit(self) -> bool:
        """Write the pending rows into the buffers."""
        pending, self._pending = self._pending, {}
        if not super().commit():
            return False
        if self._seen:
            same_pace = len(set(self._seen)) == len(set(self._counts)) == 1
            write = self._slice_writer() if same_pace else self._row_writer()
            for layer, tensors in pending.items():
                for ring, rows in zip(self._layers[layer], tensors, strict=True):
                    write(ring, rows)  # the rows' dtype may differ under autocast
        return True

    def _slice_writer(self) -> Callable[[Tensor, Tensor], None]:
        """For streams with equal ``seen`` and ``counts``, as in a training step: at most two copies a buffer."""
        streams, count = len(self._counts), self._counts[0]
        start = max(count - self.length, 0)
        slot = (self._seen[0] + start) % self.length
        wrap = min(count, start + self.length - slot)  # the row that goes to slot 0

        def write(ring: Tensor, rows: Tensor) -> None:
            rows = rows.unflatten(0, (streams, count))
            ring[:, slot : slot + wrap - start] = rows[:, start:wrap]
            ring[:, : count - wrap] = rows[:, wrap:]

        return write

    def _row_writer(self) -> Callable[[Tensor, Tensor], None]:
        """For any streams: row by row, which takes several times as long on a GPU."""
        indices, slots, offset = [], [], 0
        for b, (count, seen) in enumerate(zip(self._counts, self._seen, strict=True)):
            new = torch.arange(max(count - self.length, 0), count)
            indices.append(offset + new)
            slots.append(b * self.length + (seen + new) % self.length)
            offset += count
        device = self._layers[0][0].device
        sources, targets = to_device(torch.cat(indices), device), to_device(torch.cat(slots), device)

        def write(ring: Tensor, rows: Tensor) -> None:
            ring.flatten(0, 1)[targets] = rows[sources].to(ring.dtype)

        return write

    def state(self, seen: list[int]) -> list[Rows]:
        """Return the buffers themselves."""
        return self._layers

    def load(self, layers: list[Rows], seen: list[int]) -> None:
        """See :class:`RingBuffers`."""
        self._layers = [tuple(map(torch.clone, rings)) for rings in layers]

    def select(self, indices: Tensor) -> None:
        """See :class:`RingBuffers`."""
        for layer, rings in enumerate(self._layers):
            self._layers[layer] = tuple(ring.index_select(0, indices.to(ring.device)) for ring in rings)
