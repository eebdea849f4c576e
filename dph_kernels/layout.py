"""PackedLayout: the visibility of keys to queries.

Training, evaluation and decoding share one shape: a run of queries that sees a shared range of keys completely and its
own range causally. Tokens of many documents are concatenated without padding; a row of the segment table describes one
run.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dph_kernels.torch_private import are_functorch_transforms_active, disable_functorch, unwrapped
from dph_kernels.transfer import all_to_device

Array = np.ndarray  # for many operations on small tables NumPy's overhead is a fraction of PyTorch's
COLUMNS = ("query_start", "query_end", "key_start", "key_end", "prefix_start", "prefix_end", "position")


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (position interpolation, arXiv 2306.15595)."""

    factor: float

    def scale(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """Return the frequencies [D/2] and the factor of cosines and sines."""
        return frequencies / self.factor, 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Wavelengths that are long for the context of training divided by ``factor``, short ones kept (Llama 3.1).

    Args:
        factor: of the long ones.
        context: tokens that the model was trained with.
        low, high: a wavelength is long from ``context / low`` on, and short up to ``context / high``.
    """

    factor: float
    context: int
    low: float = 1.0
    high: float = 4.0

    def scale(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """Return the frequencies [D/2] and the factor of cosines and sines."""
        periods = self.context * frequencies / (2 * torch.pi)  # in the context
        kept = ((periods - self.low) / (self.high - self.low)).clamp(0.0, 1.0)
        return frequencies * (kept + (1.0 - kept) / self.factor), 1.0


@dataclass(frozen=True)
class YarnScaling:
    """Frequencies divided by ``factor``, but for those that turn often within the context (YaRN, arXiv 2309.00071).

    Args:
        factor: of the slow ones.
        context: tokens that the model was trained with.
        fast, slow: turns within the context from which a frequency is kept, and up to which it is divided.
        amplitude: factor of cosines and sines; None for 0.1 ln(factor) + 1.
        truncate: round the numbers of the two frequencies between which both are mixed.
    """

    factor: float
    context: int
    fast: float = 32.0
    slow: float = 1.0
    amplitude: float | None = None
    truncate: bool = True

    def scale(self, frequencies: Tensor, base: float) -> tuple[Tensor, float]:
        """Return the frequencies [D/2] and the factor of cosines and sines."""
        pairs = len(frequencies)
        low, high = (pairs * math.log(self.context / (turns * 2 * math.pi), base) for turns in (self.fast, self.slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        number = torch.arange(pairs, dtype=frequencies.dtype, device=frequencies.device)
        divided = ((number - low) / (high - low or 0.001)).clamp(0.0, 1.0)
        amplitude = self.amplitude
        if amplitude is None:
            amplitude = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return frequencies * (1.0 - divided + divided / self.factor), amplitude


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding in rotate-half form (``reversed`` negates every angle).

    Args:
        base: base of the geometric series of wavelengths.
        reversed: positions count from the newest token backwards, which equals negating every angle.
        scaling: for contexts longer than those of training.
    """

    base: float = 500_000.0
    reversed: bool = False
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def tables(self, positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, head_dim/2] of ``positions`` [T] int64, computed in fp64.

        An angle that is a product in fp32 is wrong by half a radian at position 10**7, and with memory positions grow
        without bound.
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim
        frequencies, amplitude = self.base**-exponents, 1.0
        if self.scaling is not None:
            frequencies, amplitude = self.scaling.scale(frequencies, self.base)
        angles = positions.double()[:, None] * frequencies
        cosines, sines = angles.cos(), angles.sin()
        if amplitude != 1.0:
            cosines, sines = cosines * amplitude, sines * amplitude
        return cosines.to(dtype), (-sines if self.reversed else sines).to(dtype)


def _in_transform() -> bool:
    """Whether torch.func would wrap new tensors; compiled code makes no layouts inside of its transforms."""
    return not torch.compiler.is_dynamo_compiling() and are_functorch_transforms_active()


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common prefix of at least one token sequence."""
    first, last = sequences if len(sequences) == 2 else (min(sequences), max(sequences))
    same, differ = 0, min(len(first), len(last)) + 1
    while differ - same > 1:  # slices are compared in C: several times as fast as a loop over the tokens
        middle = (same + differ) // 2
        if first[same:middle] == last[same:middle]:
            same = middle
        else:
            differ = middle
    return same


@dataclass(frozen=True, eq=False)
class PackedLayout:
    """Segments of queries over one row of keys: the memory's rows first, then the new keys.

    Key index ``j < memory`` is row ``j`` of the memory (cached, already rotated); ``j >= memory`` is new key
    ``j - memory``. Query ``i`` of a segment with n queries and m own keys sees its whole prefix range and own keys
    ``0 .. m - n + i``: causal, aligned at the end. Rows outside all segments are padding; their results are zeros.

    Args:
        segments: [G, 7] int64 on the CPU, columns ``COLUMNS``; ``position`` is the rotary position of the first query.
        queries: T, rows of queries.
        keys: S, rows of new keys.
        memory: M, rows of memory.

    Attributes:
        query_positions: [T] int64 rotary positions; padding rows have 0.
        key_positions: [S] int64 rotary positions of the new keys; the same tensor if they are equal.

    Raises ValueError if a range leaves its bounds, own keys and prefix of a segment overlap (a key would count twice),
    two segments share a query, or one key would need two positions.
    """

    segments: Tensor
    queries: int
    keys: int
    memory: int = 0
    query_positions: Tensor = field(init=False, repr=False)
    key_positions: Tensor = field(init=False, repr=False)
    _tables: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Validate the table and derive the positions from it."""
        if not _in_transform():
            self._derive_positions(self.segments)
            return
        object.__setattr__(self, "segments", unwrapped(self.segments))
        with disable_functorch():  # a layout is a constant
            self._derive_positions(self.segments)

    def _derive_positions(self, table: Tensor) -> None:
        if (
            table.ndim != 2
            or table.shape[1] != len(COLUMNS)
            or table.dtype != torch.int64
            or table.device.type != "cpu"
        ):
            raise ValueError(
                f"segments: expected int64 [G, {len(COLUMNS)}] on the CPU, got {table.dtype} {list(table.shape)}"
            )
        columns = table.numpy().T
        self._check_bounds(*columns)
        q0, q1, k0, k1, p0, p1, position = columns
        queries = _positions(self.queries, q0, q1, position)
        own = position + (q1 - q0) - (k1 - k0)  # position of the first own key
        start, end = np.concatenate([k0, p0]), np.concatenate([k1, p1])
        first = np.concatenate([own, own - (p1 - p0)])
        new = np.maximum(start, self.memory)  # memory is rotated already
        shift = new - start
        keys = _positions(self.keys, new - self.memory, np.maximum(end, new) - self.memory, first + shift)
        query_positions = torch.from_numpy(queries)
        object.__setattr__(self, "query_positions", query_positions)
        same = np.array_equal(queries, keys)
        object.__setattr__(self, "key_positions", query_positions if same else torch.from_numpy(keys))

    def _check_bounds(self, q0: Array, q1: Array, k0: Array, k1: Array, p0: Array, p1: Array, position: Array) -> None:
        total = self.memory + self.keys
        ranges = (("query", q0, q1, self.queries), ("key", k0, k1, total), ("prefix", p0, p1, total))
        for name, start, end, size in ranges:
            for number in first_true((start < 0) | (end < start) | (end > size)):
                got = f"[{start[number]}, {end[number]})"
                raise ValueError(f"segment {number}: expected a {name} range within [0, {size}], got {got}")
        for number in first_true(position < 0):
            raise ValueError(f"segment {number}: expected position >= 0, got {position[number]}")
        for number in first_true((q1 > q0) & (np.maximum(k0, p0) < np.minimum(k1, p1))):
            own, prefix = f"[{k0[number]}, {k1[number]})", f"[{p0[number]}, {p1[number]})"
            raise ValueError(f"segment {number}: expected own and prefix keys apart, got {own} and {prefix}")
        numbers = np.flatnonzero(q1 > q0)
        numbers = numbers[q0[numbers].argsort(kind="stable")]
        for i in first_true(q0[numbers[1:]] < q1[numbers[:-1]]):
            first, second = numbers[i], numbers[i + 1]
            raise ValueError(f"segments {first} and {second}: expected disjoint queries, both hold query {q0[second]}")

    # Constructors

    @classmethod
    def documents(cls, lengths: Sequence[int]) -> PackedLayout:
        """Concatenated documents, each causal and independent: lengths [B] in tokens, which may be zero."""
        return cls.shared_prefix(lengths, [()] * len(lengths))

    @classmethod
    def dense(cls, batch: int, length: int) -> PackedLayout:
        """``batch`` causal sequences of ``length`` tokens, as an unpadded [B, S] batch."""
        return cls.documents([length] * batch)

    @classmethod
    def shared_prefix(cls, prompts: Sequence[int], branches: Sequence[Sequence[int]]) -> PackedLayout:
        """Documents of one prompt followed by its branches; a branch sees the prompt and itself.

        Args:
            prompts: [B] lengths of the prompts.
            branches: for each prompt the lengths of its branches, in the order of their tokens.
        """
        _check_counts(prompts=prompts, branches=branches)
        rows, start = [], 0
        for prompt, lengths in zip(prompts, branches, strict=True):
            end = start + prompt
            rows.append((start, end, start, end, start, start, 0))
            branch = end
            for length in lengths:
                rows.append((branch, branch + length, branch, branch + length, start, end, prompt))
                branch += length
            start = branch
        return cls(_table(rows), queries=start, keys=start)

    @classmethod
    def from_sequences(cls, documents: Sequence[Sequence[Sequence[int]]]) -> PackedLayout:
        """Alternatives that share their longest common prefix: each document is a list of token sequences.

        The order of the tokens is: common prefix, rest of the first alternative, rest of the second, and so on; a rest
        may be empty (identical alternatives, or one that is a prefix of another).
        """
        for d, alternatives in enumerate(documents):
            if not len(alternatives):
                raise ValueError(f"documents[{d}]: expected at least one token sequence, got none")
        prompts = [common_prefix(alternatives) for alternatives in documents]
        rests = [[len(s) - p for s in alternatives] for p, alternatives in zip(prompts, documents, strict=True)]
        return cls.shared_prefix(prompts, rests)

    @classmethod
    def with_memory(
        cls, lengths: Sequence[int], filled: Sequence[int], capacity: int, seen: Sequence[int] | None = None
    ) -> PackedLayout:
        """Streams that see their cached memory completely and their own new tokens causally.

        Args:
            lengths: [B] new tokens of each stream.
            filled: [B] rows of each stream's memory that hold a key, in any order, as in a ring that wrapped around.
            capacity: rows of memory per stream; stream b owns rows ``b * capacity`` onwards.
            seen: [B] tokens that each stream has seen so far: the position of its first new token. ``filled`` if None.
        """
        seen = filled if seen is None else seen
        _check_counts(lengths=lengths, filled=filled, seen=seen)
        rows, start, memory = [], 0, capacity * len(lengths)
        for b, (length, full, position) in enumerate(zip(lengths, filled, seen, strict=True)):
            if full > capacity:
                raise ValueError(f"filled[{b}]: expected at most capacity = {capacity}, got {full}")
            end = start + length
            rows.append((start, end, memory + start, memory + end, b * capacity, b * capacity + full, position))
            start = end
        return cls(_table(rows), queries=start, keys=start, memory=memory)

    @classmethod
    def aligned(cls, lengths: Sequence[int], keys: Sequence[int], first: Sequence[int] | None = None) -> PackedLayout:
        """Streams with more new keys than queries, causal and aligned at the end (memory that is projected again).

        Args:
            lengths: [B] queries of each stream.
            keys: [B] keys of each stream, its queries' own keys last.
            first: [B] position of each stream's first key; zeros if None.
        """
        first = [0] * len(keys) if first is None else first
        _check_counts(lengths=lengths, keys=keys, first=first)
        rows, q0, k0 = [], 0, 0
        for length, count, position in zip(lengths, keys, first, strict=True):
            rows.append((q0, q0 + length, k0, k0 + count, k0, k0, position + count - length))
            q0, k0 = q0 + length, k0 + count
        return cls(_table(rows), queries=q0, keys=k0)

    @classmethod
    def decode(cls, prompts: Sequence[int], said: Sequence[Sequence[int]], capacity: int) -> PackedLayout:
        """One new token for each candidate; all keys are in the cache, the prompt's once.

        The cache holds, prompt after prompt: the prompt's rows, then ``capacity`` rows for each of its candidates. The
        new token's rotated key has been written there before the call, and is counted among its tokens.

        Args:
            prompts: [B] lengths of the cached prompts.
            said: for each prompt, the number of generated tokens of each candidate, including the new one (>= 1).
            capacity: rows per candidate.
        """
        _check_counts(prompts=prompts, said=said)
        rows, query, start = [], 0, 0
        for prompt, counts in zip(prompts, said, strict=True):
            candidate = start + prompt
            for count in counts:
                if not 1 <= count <= capacity:
                    raise ValueError(f"said: expected 1 <= count <= capacity = {capacity}, got {count}")
                rows.append((query, query + 1, candidate, candidate + count, start, start + prompt, prompt + count - 1))
                query, candidate = query + 1, candidate + capacity
            start = candidate
        return cls(_table(rows), queries=query, keys=0, memory=start)

    # Use

    def to(self, device: torch.device | str) -> PackedLayout:
        """Return the same layout with its positions on ``device``; the segment table stays on the CPU."""
        if self.query_positions.device == torch.device(device):
            return self
        return self.placed(*all_to_device((self.query_positions, self.key_positions), device))

    def placed(self, query_positions: Tensor, key_positions: Tensor) -> PackedLayout:
        """Return the same layout with these copies of its positions, on any device."""
        if query_positions is self.query_positions:
            return self
        moved = copy.copy(self)  # not dataclasses.replace: the table was validated once
        new = {"query_positions": query_positions, "key_positions": key_positions, "_tables": {}}
        for name, value in new.items():
            object.__setattr__(moved, name, value)
        return moved

    def tables(self, rope: Rotary, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cosines and sines of queries and new keys, [T, D/2] and [S, D/2], computed once for all layers."""
        if torch.compiler.is_compiling():  # nothing is cached
            of_queries = rope.tables(self.query_positions, head_dim, dtype)
            return *of_queries, *rope.tables(self.key_positions, head_dim, dtype)
        key = (rope, head_dim, dtype)
        if key not in self._tables:
            constant = disable_functorch() if _in_transform() else nullcontext()
            with constant, torch.inference_mode(False):  # a layout first used there may be used in training later
                of_queries = of_keys = rope.tables(self.query_positions, head_dim, dtype)
                if self.key_positions is not self.query_positions:
                    of_keys = rope.tables(self.key_positions, head_dim, dtype)
            self._tables[key] = *of_queries, *of_keys
        return self._tables[key]

    def visible(self) -> Tensor:
        """Return [T, M + S] bool, whether a key is visible to a query. For tests: the kernels never build it."""
        mask = torch.zeros(self.queries, self.memory + self.keys, dtype=torch.bool)
        for q0, q1, k0, k1, p0, p1, _ in self.segments.tolist():
            mask[q0:q1, p0:p1] = True
            own = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
            mask[q0:q1, k0:k1] |= own.tril(diagonal=(k1 - k0) - (q1 - q0))
        return mask

    def explain(self, limit: int = 96) -> str:
        """Describe the layout as text: a line per segment and, up to ``limit`` rows and columns, a character per pair.

        ``#`` a key of the own range, ``+`` a key of the prefix, ``.`` hidden; ``|`` divides memory from new keys.
        """
        lines = [f"{self.queries} queries over {self.memory} memory rows and {self.keys} new keys"]
        for number, (q0, q1, k0, k1, p0, p1, position) in enumerate(self.segments.tolist()):
            if q1 == q0:
                lines.append(f"segment {number}: no queries")
                continue
            prefix = f" and all of keys {p0}..{p1 - 1}" if p1 > p0 else ""
            own = f" sees keys {k0}..{k1 - 1} causally" if k1 > k0 else " sees no keys of its own"
            lines.append(f"segment {number}: queries {q0}..{q1 - 1} at position {position}{own}{prefix}")
        if self.queries > limit or self.memory + self.keys > limit:
            return "\n".join([*lines, f"(too large to draw: more than {limit} rows or columns)"])
        return "\n".join([*lines, "", *self._draw()])

    def _draw(self) -> list[str]:
        pictures = [["."] * (self.memory + self.keys) for _ in range(self.queries)]
        for q0, q1, k0, k1, p0, p1, _ in self.segments.tolist():
            for i in range(q0, q1):
                pictures[i][p0:p1] = "+" * (p1 - p0)
                seen = max((k1 - k0) - (q1 - q0) + i - q0 + 1, 0)
                pictures[i][k0 : k0 + seen] = "#" * seen
        divider = "|" if self.memory else ""
        return ["".join(p[: self.memory]) + divider + "".join(p[self.memory :]) for p in pictures]


def _check_counts(**arguments: Sequence) -> None:
    """Require sequences of one length, with an entry per document or stream."""
    (reference, expected), *others = arguments.items()
    for name, values in others:
        if len(values) != len(expected):
            raise ValueError(f"{name}: expected {len(expected)} entries, as many as {reference}, got {len(values)}")


def _positions(rows: int, start: Array, end: Array, first: Array) -> Array:
    """Return positions [rows], counted from ``first`` in each range of rows [start, end), and 0 outside of them.

    Ranges of new keys may overlap, if they agree.
    """
    lengths = end - start
    before = lengths.cumsum() - lengths
    covered = np.arange(lengths.sum()) + np.repeat(start - before, lengths)
    values = covered + np.repeat(first - start, lengths)
    positions = np.zeros(rows, dtype=np.int64)
    positions[covered] = values
    for i in first_true(positions[covered] != values):
        both = sorted((int(values[i]), int(positions[covered[i]])))
        raise ValueError(f"new key {covered[i]}: expected one position, got {both[0]} and {both[1]}")
    return positions


def first_true(wrong: Array | Tensor) -> list[int]:
    """Return the index of the first True, if there is one, in a list."""
    return np.flatnonzero(wrong)[:1].tolist()


def _table(rows: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.int64).reshape(-1, len(COLUMNS)))
