"""Where a memory's rows lie: what it asks of a place, and rings on the device (``dph.model.kv_ring_offload``: on the host).

Every place gives a call the same rows in the same order, so that nothing that is computed depends on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from dph_kernels.transfer import to_device

Rows = tuple[Tensor, ...]  # keys and values, or the attention's inputs


class Rings(ABC):
    """What a memory asks of a place. A call sees M rows of every stream, the token at position p in slot p % M.

    A call is ``begin``, ``read`` and ``keep`` of every layer, ``end``; ``commit`` turns what it kept into what the next
    one reads. A call that never ends leaves no trace.

    Args:
        length: M.
        parts: tensors of a layer: 2 for keys and values, 1 for inputs.
    """

    def __init__(self, length: int, parts: int) -> None:
        self.length, self.parts = length, parts
        self.under_way = False
        self._layers: list[Rows] = []
        self._ended = False  # and not yet committed
        self._seen: list[int] = []  # tokens that each stream had seen when the last call began
        self._counts: list[int] = []  # and those that the call brought

    def begin(self, seen: list[int], counts: list[int]) -> None:
        """A call with ``counts`` [B] tokens of streams that have seen ``seen`` [B]."""
        self._seen, self._counts, self.under_way = seen, counts, True

    @abstractmethod
    def read(self, layer: int, like: Tensor) -> Rows:
        """What the call sees of a layer, [B * M, ...], on the device of ``like`` [*, ...], whose shape rows have."""

    @abstractmethod
    def keep(self, layer: int, rows: Rows) -> None:
        """Take the call's rows [T, ...] of a layer."""

    def end(self) -> None:
        """The call has kept all."""
        self.under_way, self._ended = False, True

    def commit(self) -> bool:
        """Count what the last call kept, if that has not been done; whether it had to be."""
        done, self._ended = self._ended, False
        return done

    @abstractmethod
    def state(self, seen: list[int]) -> list[Rows]:
        """Every layer as [B, M, ...], once committed; it may share memory with the rings."""

    @abstractmethod
    def load(self, layers: list[Rows], seen: list[int]) -> None:
        """Take up what ``state`` gave."""

    @abstractmethod
    def select(self, indices: Tensor) -> None:
        """Only the streams ``indices`` [B'], in that order, once committed."""

    def __len__(self) -> int:
        """Layers."""
        return len(self._layers)


class DeviceRings(Rings):
    """Rings [B, M, ...] where the model is. A call's rows wait for ``commit``: they overwrite what it reads."""

    def __init__(self, length: int, parts: int) -> None:
        super().__init__(length, parts)
        self._kept: dict[int, Rows] = {}

    def begin(self, seen: list[int], counts: list[int]) -> None:
        """See :class:`Rings`."""
        super().begin(seen, counts)
        self._kept = {}

    def read(self, layer: int, like: Tensor) -> Rows:
        """The rings themselves; zeros at first."""
        if layer == len(self._layers):
            size = (len(self._seen), self.length, *like.shape[1:])
            with torch.inference_mode(False):  # what is read in inference mode may be written in training
                self._layers.append(tuple(like.new_zeros(size) for _ in range(self.parts)))
        return tuple(ring.flatten(0, 1) for ring in self._layers[layer])

    def keep(self, layer: int, rows: Rows) -> None:
        """See :class:`Rings`."""
        self._kept[layer] = rows

    def commit(self) -> bool:
        """Write what the last call kept."""
        kept, self._kept = self._kept, {}
        if not super().commit():
            return False
        if self._seen:
            self._write(kept)
        return True

    def _write(self, kept: dict[int, Rows]) -> None:
        alike = len(set(self._seen)) == len(set(self._counts)) == 1
        write = self._write_spans() if alike else self._write_rows()
        for layer, tensors in kept.items():
            for ring, tensor in zip(self._layers[layer], tensors, strict=True):
                write(ring, tensor)  # whose dtype may be another under autocast

    def _write_spans(self) -> Callable[[Tensor, Tensor], None]:
        """Of streams that have seen and bring as much as each other, as in a training step: two copies at most."""
        streams, count = len(self._counts), self._counts[0]
        first = max(count - self.length, 0)
        slot = (self._seen[0] + first) % self.length
        turn = min(count, first + self.length - slot)  # the row that comes to lie in slot 0

        def write(ring: Tensor, tensor: Tensor) -> None:
            rows = tensor.unflatten(0, (streams, count))
            ring[:, slot : slot + turn - first] = rows[:, first:turn]
            ring[:, : count - turn] = rows[:, turn:]

        return write

    def _write_rows(self) -> Callable[[Tensor, Tensor], None]:
        """Of any streams, row by row, which on a GPU takes several times as long."""
        rows, slots, start = [], [], 0
        for b, (count, seen) in enumerate(zip(self._counts, self._seen, strict=True)):
            new = torch.arange(max(count - self.length, 0), count)
            rows.append(start + new)
            slots.append(b * self.length + (seen + new) % self.length)
            start += count
        device = self._layers[0][0].device
        rows, slots = to_device(torch.cat(rows), device), to_device(torch.cat(slots), device)

        def write(ring: Tensor, tensor: Tensor) -> None:
            ring.flatten(0, 1)[slots] = tensor[rows].to(ring.dtype)

        return write

    def state(self, seen: list[int]) -> list[Rows]:
        """The rings themselves."""
        return self._layers

    def load(self, layers: list[Rows], seen: list[int]) -> None:
        """See :class:`Rings`."""
        self._layers = [tuple(ring.clone() for ring in rings) for rings in layers]

    def select(self, indices: Tensor) -> None:
        """See :class:`Rings`."""
        self._layers = [tuple(r.index_select(0, indices.to(r.device)) for r in rings) for rings in self._layers]
