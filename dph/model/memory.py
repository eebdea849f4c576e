"""Memory: Transformer-XL memory and decoding cache in one, as a transformers ``Cache``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dph.model.kv_ring import DeviceRingBuffers, Rows
from dph.model.kv_ring_offload import HostRingBuffers
from dph_kernels.layout import PackedLayout

KINDS = ("kv", "hidden")
PLACES = {"device": DeviceRingBuffers, "host": HostRingBuffers}


class Memory(Cache):
    """The last ``length`` tokens of every layer, carried from call to call without gradient.

    One ring buffer per layer, allocated once. Keys are stored rotated at absolute positions, and attention does not
    depend on the order of keys, so nothing is ever moved, rotated again or concatenated. The rows of a call become
    visible in the next one: until then its backward pass may read the old rows.

    Args:
        length: capacity M in tokens per stream.
        kind: "kv" stores keys and values. "hidden" stores the inputs of attention, from which every call projects keys
            and values, so that their weights get gradients from memory rows too. A model has to be used with the kind
            that it was trained with: ``Memory(kind=model.config.memory_kind)``.
        place: "device" holds the buffers on the model's device. "host" holds them, at twice the size, in pinned host
            memory, and copies the rows of a layer to the device while the layer before it computes. The results are
            equal bit for bit.

    Use: ``model(ids, past_key_values=memory)`` reads and updates it; every row of a batch is one stream. Padding is not
    stored.
    """

    def __init__(self, length: int = 2048, kind: str = "kv", place: str = "device") -> None:
        super().__init__(layers=[])
        if length < 1:
            raise ValueError(f"length: expected at least 1 token, got {length}")
        for name, value, allowed in (("kind", kind, KINDS), ("place", place, PLACES)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
        self.length, self.kind, self.place = length, kind, place
        self.version = 0  # changes when a call begins and when the visible rows change
        self.reset()

    def reset(self) -> None:
        """Forget all streams; the next call may have another batch size."""
        self.seen: list[int] = []  # tokens of each stream, without padding
        self.columns = 0  # columns of input, padding included
        self._rings = PLACES[self.place](self.length, self._tensors)
        self.version += 1

    @property
    def _tensors(self) -> int:
        """Tensors of a layer."""
        return 2 if self.kind == "kv" else 1

    # Called by the model, in this order

    def begin(self, counts: list[int]) -> PackedLayout:
        """Commit the last call, and return the layout of one with ``counts`` [B] new tokens per stream."""
        self.commit()
        self.version += 1
        if self.seen and len(counts) != len(self.seen):
            raise ValueError(f"past_key_values: expected a batch of {len(self.seen)} streams, got {len(counts)}")
        self.seen = self.seen or [0] * len(counts)
        self._rings.begin(self.seen, counts)
        filled = [min(seen, self.length) for seen in self.seen]
        if self.kind == "kv":
            return PackedLayout.with_memory(counts, filled, self.length, self.seen)
        keys, first = [], []
        for seen, stored, count in zip(self.seen, filled, counts, strict=True):
            keys.append(stored + count)
            first.append(seen - stored)
        return PackedLayout.aligned(counts, keys, first)

    def by_layer(self, counts: Sequence[int]) -> Callable[[int], LayerMemory]:
        """Return a function from a layer's number to its view for the current call, of ``counts`` [B] tokens."""
        return lambda layer: LayerMemory(self, layer, list(counts), self.seen, self.version)

    def read(self, layer: int, like: Tensor) -> Rows:
        """Return the rows [B * M, ...] of a layer; at first zeros of the shape of the rows of ``like`` [*, ...]."""
        return self._rings.read(layer, like)

    def keep(self, layer: int, *rows: Tensor) -> None:
        """Store the call's rows [T, ...] of a layer, detached, for the next call.

        Outside of a call, when gradient checkpointing recomputes it, this does nothing.
        """
        if self._rings.in_call:
            self._rings.store(layer, tuple(tensor.detach() for tensor in rows))

    def end(self, counts: list[int], columns: int) -> None:
        """Count the call's tokens; ``columns`` is the width of its input, padding included."""
        self._rings.end()
        self.seen = [seen + count for seen, count in zip(self.seen, counts, strict=True)]
        self.columns += columns

    def commit(self) -> None:
        """Make the last call's rows visible now, after its backward pass; otherwise the next call does it.

        On the device this frees the tensors in which the rows were held.
        """
        if self._rings.commit():
            self.version += 1

    # State for checkpoints of a run

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors, the same for every place; they may share storage with the buffers."""
        self.commit()
        state = {"seen": torch.tensor(self.seen, dtype=torch.int64)}
        for name, number in {"columns": self.columns, "length": self.length, "kind": KINDS.index(self.kind)}.items():
            state[name] = torch.tensor(number)
        for layer, tensors in enumerate(self._rings.state(self.seen)):
            state |= {f"{layer}.{number}": tensor for number, tensor in enumerate(tensors)}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the result of :meth:`state_dict` of a memory in any place.

        Raises ValueError, and leaves the memory as it was, if the state is incomplete or of another length or kind.
        """
        if absent := {"seen", "columns", "length", "kind"} - state.keys():
            raise ValueError(f"memory: expected a state with {', '.join(sorted(absent))}, got {', '.join(state)}")
        length, kind, seen = int(state["length"]), KINDS[int(state["kind"])], state["seen"].tolist()
        if (length, kind) != (self.length, self.kind):
            raise ValueError(
                f"memory: expected a length of {self.length} and the kind {self.kind!r}, got {length} and {kind!r}"
            )
        layers: list[Rows] = []
        while f"{len(layers)}.0" in state:
            tensors = tuple(state[f"{len(layers)}.{number}"] for number in range(self._tensors))
            sizes = [list(tensor.shape[:2]) for tensor in tensors]
            if any(size != [len(seen), length] for size in sizes):
                raise ValueError(f"memory: expected {[len(seen), length]} streams and tokens, got {sizes}")
            layers.append(tensors)
        self.reset()
        self.seen, self.columns = seen, int(state["columns"])
        self._rings.load(layers, seen)

    # Called by transformers

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns of input so far; ``generate`` slices its input there."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: old tokens are overwritten, so the length of a stream has no limit."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the number of keys that ``query_length`` columns attend to, and the offset of the first."""
        stored = min(self.columns, self.length)
        return stored + query_length, self.columns - stored

    @property
    def batch_size(self) -> int:
        """Streams, or -1 before the first call."""
        return len(self.seen) or -1

    @property
    def is_initialized(self) -> bool:
        """Whether there was a call."""
        return bool(self.seen)

    @property
    def is_croppable(self) -> bool:
        """Whether the newest tokens can be removed: only while no old ones have been overwritten."""
        return all(seen <= self.length for seen in self.seen)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest n tokens of every stream, given as ``-n``: transformers' convention.

        Raises ValueError for a positive number, and once a stream is longer than the memory.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove: expected minus the number of tokens, got {tokens_to_remove}")
        self.commit()
        if tokens_to_remove and not self.is_croppable:
            raise ValueError(f"crop: expected streams of at most {self.length} tokens, got {max(self.seen)}")
        self.seen = [max(seen + tokens_to_remove, 0) for seen in self.seen]
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
        """Select the streams of the surviving beams."""
        if self.seen:
            self.batch_select_indices(beam_idx)

    def __len__(self) -> int:
        """Number of layers with a buffer."""
        return len(self._rings)

    def __repr__(self) -> str:
        """Length, kind, streams and columns."""
        return f"Memory(length={self.length}, kind={self.kind!r}, streams={len(self.seen)}, columns={self.columns})"


@dataclass(frozen=True)
class LayerMemory:
    """View of one layer of a :class:`Memory` for one call, valid also when checkpointing recomputes the call.

    Reading raises RuntimeError if another call has begun by then: the rows that the call read are overwritten.
    """

    memory: Memory
    layer: int
    counts: list[int]
    seen: list[int]
    version: int

    @property
    def kind(self) -> str:
        """ "kv" or "hidden"."""
        return self.memory.kind

    def read(self, like: Tensor) -> Rows:
        """Return the stored rows [B * M, ...], of the shape of the rows of ``like`` [*, ...]."""
        if self.memory.version != self.version:
            raise RuntimeError(
                "memory: expected a backward pass before the memory's next call, as gradient checkpointing computes "
                "the forward pass again, from what the memory held"
            )
        return self.memory.read(self.layer, like)

    def concat_inputs(self, inputs: Tensor) -> Tensor:
        """Return stored and new attention inputs, oldest first, stream after stream (kind "hidden")."""
        (stored,) = self.read(inputs)
        length, pieces = self.memory.length, []
        for b, new in enumerate(inputs.split(self.counts)):
            positions = torch.arange(max(self.seen[b] - length, 0), self.seen[b], device=stored.device)
            pieces += [stored[b * length + positions % length], new]
        return torch.cat(pieces) if pieces else inputs

    def keep(self, *rows: Tensor) -> None:
        """Store the call's rows of this layer."""
        self.memory.keep(self.layer, *rows)
