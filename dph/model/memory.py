"""Memory: Transformer-XL memory and decoding cache in one, as a transformers ``Cache``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dph.model.kv_ring import DeviceRings, Rows
from dph.model.kv_ring_offload import HostRings
from dph_kernels import PackedLayout

KINDS = ("kv", "hidden")
PLACES = {"device": DeviceRings, "host": HostRings}


class Memory(Cache):
    """The last ``length`` tokens of every layer, carried from call to call without gradient.

    A ring buffer per layer, allocated once. Keys are kept rotated at absolute positions that roll on, and attention
    does not mind the order of what it sees, so nothing is ever moved, rotated again or concatenated. What a forward
    pass adds is not to be seen before the next one: until then its backward pass may still read the old rows.

    Args:
        length: capacity M in tokens per stream.
        kind: "kv" keeps keys and values; "hidden" keeps the attention's inputs, from which every call projects keys and
            values anew, so that their weights get gradient from memory rows too. A model trained with the one
            is to be read with the same: ``Memory(kind=model.config.memory_kind)`` is what a released model says of
            itself (its ``recompute_kv``).
        place: "device" keeps the rings where the model is; "host" keeps them, at twice the size, in pinned memory of
            the host, and copies to the device what a layer needs while the layer before it computes. Both compute the
            same, bit for bit.

    Use: ``model(ids, past_key_values=memory)`` reads and updates it; every row of a batch is one stream. Padding is
    never stored.
    """

    def __init__(self, length: int = 2048, kind: str = "kv", place: str = "device") -> None:
        super().__init__(layers=[])
        if length < 1:
            raise ValueError(f"length: expected at least 1 token, got {length}")
        for name, value, known in (("kind", kind, KINDS), ("place", place, PLACES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {value!r}")
        self.length, self.kind, self.place = length, kind, place
        self.version = 0  # another one when a call begins, and when what calls read has changed
        self.reset()

    def reset(self) -> None:
        """Forget everything; the next call decides the batch size anew."""
        self.seen: list[int] = []  # tokens that each stream has seen, padding left out
        self.columns = 0  # columns of input that have passed, padding included
        self._rings = PLACES[self.place](self.length, self._parts)
        self.version += 1

    @property
    def _parts(self) -> int:
        """Tensors of a layer."""
        return 2 if self.kind == "kv" else 1

    # What the model calls, in this order

    def begin(self, counts: list[int]) -> PackedLayout:
        """Take up what the last call left, and describe a call with ``counts`` [B] new tokens per stream."""
        self.commit()
        self.version += 1
        if self.seen and len(counts) != len(self.seen):
            raise ValueError(f"past_key_values: expected a batch of {len(self.seen)} streams, got {len(counts)}")
        self.seen = self.seen or [0] * len(counts)
        self._rings.begin(self.seen, counts)
        filled = [min(n, self.length) for n in self.seen]
        if self.kind == "kv":
            return PackedLayout.with_memory(counts, filled, self.length, self.seen)
        first = [s - f for s, f in zip(self.seen, filled, strict=True)]
        return PackedLayout.aligned(counts, [f + c for f, c in zip(filled, counts, strict=True)], first)

    def read(self, layer: int, like: Tensor) -> Rows:
        """Rows [B * M, ...] of a layer's keys and values; zeros of the shape of ``like`` [*, H, D] at first."""
        return self._rings.read(layer, like)

    def recall(self, layer: int, inputs: Tensor, counts: list[int], seen: list[int]) -> Tensor:
        """Attention inputs of memory and call, oldest first, stream after stream (kind "hidden").

        counts, seen: tokens of each stream in the call, and those that it had seen before.
        """
        (rows,) = self.read(layer, inputs)
        parts = []
        for b, own in enumerate(inputs.split(counts)):
            first = max(seen[b] - self.length, 0)
            slots = b * self.length + torch.arange(first, seen[b], device=rows.device) % self.length
            parts += [rows[slots], own]
        return torch.cat(parts) if parts else inputs

    def keep(self, layer: int, *rows: Tensor) -> None:
        """Hold the call's rows [T, ...] of a layer for the next one; their gradient ends here.

        Not a second time where gradient checkpointing computes the call again.
        """
        if self._rings.under_way:
            self._rings.keep(layer, tuple(r.detach() for r in rows))

    def end(self, counts: list[int], columns: int) -> None:
        """Count the call's tokens; ``columns`` is the width of its input, padding included."""
        self._rings.end()
        self.seen = [s + c for s, c in zip(self.seen, counts, strict=True)]
        self.columns += columns

    def commit(self) -> None:
        """Put the last call's rows where the next one reads, which it would do: here, once its backward pass is over.

        On the device this frees the memory in which they waited.
        """
        if self._rings.commit():
            self.version += 1

    # Checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, for a checkpoint: the same in every place. It may share memory with the rings."""
        self.commit()
        numbers = {"columns": self.columns, "length": self.length, "kind": KINDS.index(self.kind)}
        state = {"seen": torch.tensor(self.seen, dtype=torch.int64)}
        state |= {name: torch.tensor(number) for name, number in numbers.items()}
        for layer, rings in enumerate(self._rings.state(self.seen)):
            state |= {f"{layer}.{part}": ring for part, ring in enumerate(rings)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` gave, whatever the place.

        Raises ValueError where the memory has another length or kind.
        """
        if lacking := {"seen", "columns", "length", "kind"} - state.keys():
            raise ValueError(f"memory: expected a state with {', '.join(sorted(lacking))}, got {', '.join(state)}")
        length, kind, seen = int(state["length"]), KINDS[int(state["kind"])], state["seen"].tolist()
        if (length, kind) != (self.length, self.kind):
            raise ValueError(
                f"memory: expected a length of {self.length} and the kind {self.kind!r}, got {length} and {kind!r}"
            )
        layers: list[Rows] = []
        while f"{len(layers)}.0" in state:
            layers.append(tuple(state[f"{len(layers)}.{part}"] for part in range(self._parts)))
            if any(ring.shape[:2] != (len(seen), length) for ring in layers[-1]):
                wrong = [list(ring.shape[:2]) for ring in layers[-1]]
                raise ValueError(f"memory: expected {[len(seen), length]} streams and tokens, got {wrong}")
        self.reset()
        self.seen, self.columns = seen, int(state["columns"])
        self._rings.load(layers, seen)

    # What transformers calls

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input seen so far: ``generate`` cuts its input there."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the memory forgets, so any length may pass through."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that a call of ``query_length`` columns sees, and the offset of the first of them."""
        kept = min(self.columns, self.length)
        return kept + query_length, self.columns - kept

    @property
    def batch_size(self) -> int:
        """Streams, or -1 before the first call."""
        return len(self.seen) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether a call has been made."""
        return bool(self.seen)

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be taken back: not once old ones have been overwritten."""
        return all(n <= self.length for n in self.seen)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens of every stream: ``-n`` for n tokens, which is transformers' convention.

        Raises ValueError for a positive number, and once the ring has turned: what it overwrote is gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected minus the number of tokens, got {tokens_to_remove}")
        self.commit()
        if tokens_to_remove and not self.is_croppable:
            raise ValueError(f"crop: expected streams of at most {self.length} tokens, got {max(self.seen)}")
        self.seen = [max(n + tokens_to_remove, 0) for n in self.seen]
        self.columns = max(self.columns + tokens_to_remove, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the streams ``indices`` [B'], in that order."""
        self.commit()
        self.seen = [self.seen[i] for i in indices.tolist()]
        self._rings.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every stream ``repeats`` times."""
        if self.seen:
            self.batch_select_indices(torch.arange(len(self.seen)).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        if self.seen:
            self.batch_select_indices(beam_idx)

    def __len__(self) -> int:
        """Layers with a ring."""
        return len(self._rings)

    def __repr__(self) -> str:
        """Sizes and fill."""
        return f"Memory(length={self.length}, kind={self.kind!r}, streams={len(self.seen)}, columns={self.columns})"


@dataclass(frozen=True)
class LayerMemory:
    """One layer's view of a :class:`Memory` during one call, and when that is computed again.

    RuntimeError where by then another call has begun: what the memory held is gone.
    """

    memory: Memory
    layer: int
    counts: list[int]
    seen: list[int]
    version: int

    @classmethod
    def of(cls, memory: Memory, layer: int, counts: Sequence[int]) -> LayerMemory:
        """As the call that is under way finds it."""
        return cls(memory, layer, list(counts), memory.seen, memory.version)

    @property
    def kind(self) -> str:
        """ "kv" or "hidden"."""
        return self.memory.kind

    def read(self, like: Tensor) -> tuple[Tensor, ...]:
        """Rotated keys and values [M, H, D]."""
        self._check()
        return self.memory.read(self.layer, like)

    def recall(self, inputs: Tensor) -> Tensor:
        """Remembered and new attention inputs, stream after stream."""
        self._check()
        return self.memory.recall(self.layer, inputs, self.counts, self.seen)

    def keep(self, *rows: Tensor) -> None:
        """Remember this call's rows."""
        self.memory.keep(self.layer, *rows)

    def _check(self) -> None:
        if self.memory.version != self.version:
            raise RuntimeError(
                "memory: expected a backward pass before the memory's next call, as gradient checkpointing computes "
                "the forward pass again, from what the memory held"
            )
