"""Block-sparse schedule of a layout: the blocks of keys that each tile of queries visits, and vice versa.

A tile is a run of neighbouring rows that one program computes; a run is a range of the other side that it loops over in
blocks. If every row of a tile sees every row of the blocks, the run is *full* and needs no mask; otherwise the mask
follows from ``bounds``. Invisible blocks are in no run and cost nothing. A schedule is computed once for all layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dph_kernels.transfer import all_to_device

Array = np.ndarray
CPU = torch.device("cpu")


class Schedule(NamedTuple):
    """Items of a kernel, those with the most blocks first; all int32.

    tiles: [N, 6] columns start, end (rows of the tile), first_run, first_masked, last_run (its full runs, then its
        masked ones), parts (number of segments of its rows). A tile without runs only writes zeros.
    runs: [R, 2] start, end; full runs consist of whole blocks, and no run crosses from the memory to the new keys.
    pieces: [P + 1] if the work of some tile is split, else None: entries ``pieces[i]`` to ``pieces[i + 1]`` of
        ``order`` are the items of tile i, in the order of rows.
    order: [N] see ``pieces``.
    """

    tiles: Tensor
    runs: Tensor
    pieces: Tensor | None = None
    order: Tensor | None = None

    @property
    def split(self) -> bool:
        """Whether some tile is computed by several items, whose results have to be combined."""
        return self.pieces is not None


def content_of(segments: Tensor) -> bytes:
    """Return the part of a layout's table that schedules depend on, by which they are cached.

    Positions, which advance from step to step, are not in it.
    """
    return segments.numpy()[:, :6].tobytes()


def segments_of(content: bytes) -> Array:
    """Segments [G, 6] that have queries, in the order of their queries."""
    table = np.frombuffer(content, dtype=np.int64).reshape(-1, 6)
    table = table[table[:, 1] > table[:, 0]]
    return table[table[:, 0].argsort(kind="stable")]


@functools.lru_cache(maxsize=256)
def bounds(content: bytes, queries: int, *, device: torch.device) -> Tensor:
    """Bounds [T, 4] int32: query i sees keys ``[0] <= j < [1]`` of its own and ``[2] <= j < [3]`` of its prefix."""
    q0, q1, k0, k1, p0, p1 = segments_of(content).T
    count = q1 - q0
    rows = _count_on(q0, count)
    seen = np.stack([k0, k1 - q1 + 1, p0, p1], 1).astype(np.int32).repeat(count, axis=0)
    seen[:, 1] = np.maximum(seen[:, 1] + rows, seen[:, 0])
    if len(rows) < queries:  # padding sees nothing
        seen, seen_by_rows = np.zeros((queries, 4), dtype=np.int32), seen
        seen[rows] = seen_by_rows
    return _tensors([seen], device)[0]


@functools.lru_cache(maxsize=256)
def by_queries(
    content: bytes, queries: int, memory: int, *, rows: int, block: int, limit: int = 0, apart: bool = False,
    growing: bool = False, device: torch.device,
) -> Schedule:  # fmt: skip
    """Tiles of up to ``rows`` queries and the keys that they see (memory first), in blocks of ``block``.

    ``limit`` > 0 splits a tile's work into items of at most that many blocks (few queries on many keys). ``apart``: no
    tile has queries of two segments. ``growing``: queries may see fewer own keys than their segment has, so that all
    runs of these are masked.
    """
    if device != CPU:  # computed on the CPU first, which also needs the schedule to decide on a split
        options = {"limit": limit, "apart": apart, "growing": growing}
        work = by_queries(content, queries, memory, rows=rows, block=block, **options, device=CPU)
        return Schedule(*all_to_device([tensor for tensor in work if tensor is not None], device))
    table = segments_of(content)
    tiles = _cut_apart(table, queries, rows) if apart else _cut(*_query_groups(table, queries), rows, block)
    tile, owner = _crossings(tiles, table[:, 0], table[:, 1])
    q0, q1, k0, k1, p0, p1 = table[owner].T
    first, last = np.maximum(tiles[tile, 0], q0), np.minimum(tiles[tile, 1], q1)
    for_all, for_any = np.maximum(k1 - q1 + 1 + first, k0), np.maximum(k1 - q1 + last, k0)
    count = last - first
    one = np.ones_like(count)
    axis = int(max(k1.max(initial=0), p1.max(initial=0), memory)) + 1
    seen = _levels(tile, [(p0, p1, one), (k0, for_any, one)], np.ones(len(tiles), np.int64), axis)
    always = [(p0, p1, count)] if growing else [(p0, p1, count), (k0, for_all, count)]
    full = _levels(tile, always, tiles[:, 1] - tiles[:, 0], axis)
    seen, full = _split_at(seen, memory, axis), _split_at(full, memory, axis)
    return _schedule(tiles, seen, full, np.bincount(tile, minlength=len(tiles)), block, axis, memory, limit, device)


@functools.lru_cache(maxsize=256)
def by_keys(
    content: bytes, queries: int, keys: int, memory: int, *, rows: int, block: int, device: torch.device
) -> Schedule:
    """Tiles of up to ``rows`` new keys (numbered without the memory) and the queries that see them."""
    table = segments_of(content)
    q0, q1, *ranges = table.T
    k0, k1, p0, p1 = (np.maximum(x - memory, 0) for x in ranges)
    shift = ranges[1] - memory - q1  # the first query that sees own key j is j - shift
    tiles = _cut(*_key_groups(q0, q1, k0, k1, p0, p1, shift, keys), rows, block)
    parts = []
    for start, end, own in ((k0, k1, True), (p0, p1, False)):
        tile, owner = _crossings(tiles, start, end)
        low, high = np.maximum(tiles[tile, 0], start[owner]), np.minimum(tiles[tile, 1], end[owner])
        a, b, s = q0[owner], q1[owner], shift[owner]
        for_any, for_all = (np.clip(x - s, a, b) if own else a for x in (low, high - 1))
        parts.append((tile, for_any, for_all, b, high - low))
    tile, for_any, for_all, end, count = (np.concatenate(x) for x in zip(*parts, strict=True))
    axis = queries + 1
    seen = _levels(tile, [(for_any, end, np.ones_like(count))], np.ones(len(tiles), np.int64), axis)
    full = _levels(tile, [(for_all, end, count)], tiles[:, 1] - tiles[:, 0], axis)
    return _schedule(tiles, seen, full, np.bincount(tile, minlength=len(tiles)), block, axis, 0, 0, device)


@functools.lru_cache(maxsize=256)
def by_component(
    content: bytes, queries: int, memory: int, *, rows: int, block: int, device: torch.device
) -> tuple[Schedule, Tensor]:
    """Tiles of ``by_queries`` in the order of their rows within components, and the components' starts [C + 1] int32.

    Tiles of different components see no new key in common, so that threads can add up their gradients concurrently.
    The component with the most work comes first.
    """
    work = by_queries(content, queries, memory, rows=rows, block=block, device=CPU)
    tiles, runs = work.tiles.numpy().astype(np.int64), work.runs.numpy().astype(np.int64)
    owner = np.repeat(np.arange(len(tiles)), tiles[:, 4] - tiles[:, 2])
    runs = runs[_count_on(tiles[:, 2], tiles[:, 4] - tiles[:, 2])]
    new = runs[:, 0] >= memory
    low, high = np.full(len(tiles), np.iinfo(np.int64).max), np.full(len(tiles), -1)
    np.minimum.at(low, owner[new], runs[new, 0])
    np.maximum.at(high, owner[new], runs[new, 1])
    low = np.where(high < 0, 0, low)  # a tile without new keys has none in common with others
    order = np.argsort(low, kind="stable")
    reach = np.maximum.accumulate(high[order]) if len(order) else high
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = low[order][1:] >= np.maximum(reach[:-1], 0)
    component = np.empty(len(order), np.int64)
    component[order] = fresh.cumsum() - 1
    weight = np.bincount(component, np.bincount(owner, runs[:, 1] - runs[:, 0], len(tiles)))
    rank = np.empty(len(weight), np.int64)
    rank[np.argsort(-weight, kind="stable")] = np.arange(len(weight))
    order = np.lexsort((tiles[:, 0], rank[component]))
    starts = np.append(0, np.bincount(rank[component]).cumsum()) if len(order) else np.zeros(1)
    tiles, runs, starts = _tensors([tiles[order], work.runs.numpy(), starts], device)
    return Schedule(tiles, runs), starts


# Cutting rows into tiles


def _query_groups(table: Array, queries: int) -> tuple[Array, Array]:
    """Runs of queries that share a prefix, and the gaps between them: ranges [n, 2] and the keys seen [n, 4]."""
    q0, q1, k0, k1, p0, p1 = table.T
    follows = np.zeros(len(table), dtype=bool)
    follows[1:] = (q0[1:] == q1[:-1]) & (p0[1:] == p0[:-1]) & (p1[1:] == p1[:-1]) & (p1[1:] > p0[1:])
    heads = np.flatnonzero(~follows)
    if len(heads):
        tails = np.append(heads[1:], len(table)) - 1
        ranges = np.stack([q0[heads], q1[tails]], 1)
        seen = np.stack([p0[heads], p1[heads], np.minimum.reduceat(k0, heads), np.maximum.reduceat(k1, heads)], 1)
    else:
        ranges, seen = np.empty((0, 2), np.int64), np.empty((0, 4), np.int64)
    gaps = np.stack([np.append(0, ranges[:, 1]), np.append(ranges[:, 0], queries)], 1)
    gaps = gaps[gaps[:, 1] > gaps[:, 0]]  # padding, which sees nothing
    ranges = np.concatenate([ranges, gaps])
    seen = np.concatenate([seen, np.zeros((len(gaps), 4), np.int64)])
    order = ranges[:, 0].argsort(kind="stable")
    return ranges[order], seen[order]


def _key_groups(
    q0: Array, q1: Array, k0: Array, k1: Array, p0: Array, p1: Array, shift: Array, keys: int
) -> tuple[Array, Array]:
    """Runs of new keys that the same segments see, if any: ranges [n, 2] and the queries that see them [n, 4]."""
    cuts = np.unique(np.concatenate([k0, k1, p0, p1, [0, keys]]))
    ranges = np.stack([cuts[:-1], cuts[1:]], 1)
    low, high = np.full(len(ranges), np.iinfo(np.int64).max), np.zeros(len(ranges), np.int64)
    for start, end, own in ((k0, k1, True), (p0, p1, False)):
        piece, owner = _crossings(ranges, start, end)
        first = np.clip(ranges[piece, 0] - shift[owner], q0[owner], q1[owner]) if own else q0[owner]
        np.minimum.at(low, piece, first)
        np.maximum.at(high, piece, q1[owner])
    low = np.minimum(low, high)
    return ranges, np.stack([low, high, high, high], 1)


def _cut(ranges: Array, seen: Array, rows: int, block: int) -> Array:
    """Tiles [N, 2] of at most ``rows`` rows; a group joins the tile before it if that saves blocks.

    It does if both see the same rows, or few neighbouring ones. Groups that see different rows (the memories of two
    streams) stay apart, so that each loops over its own only.
    """
    tiles: list[tuple[int, int]] = []
    start = end = cost = 0
    view = (0, 0, 0, 0)
    for (low, high), mine in zip(ranges.tolist(), seen.tolist(), strict=True):
        mine_cost = _blocks(*mine, block)
        if start < end and low == end and high - start <= rows:
            joint = _hull(view, mine)
            joint_cost = _blocks(*joint, block)
            if joint_cost < cost + mine_cost and 2 * joint_cost <= 2 * max(cost, mine_cost) + min(cost, mine_cost):
                end, view, cost = high, joint, joint_cost
                continue
        if end > start:
            tiles.append((start, end))
        while high - low > rows:
            tiles.append((low, low + rows))
            low += rows
        start, end, view, cost = low, high, tuple(mine), mine_cost
    if end > start:
        tiles.append((start, end))
    return np.array(tiles, dtype=np.int64).reshape(-1, 2)


def _cut_apart(table: Array, queries: int, rows: int) -> Array:
    """Tiles [N, 2] of at most ``rows`` rows, each of one segment or of the padding between two."""
    q0, q1 = table[:, 0], table[:, 1]
    starts, ends = np.append(0, q1), np.append(q0, queries)  # of the gaps
    starts, ends = np.concatenate([starts, q0]), np.concatenate([ends, q1])
    count = -(-(ends - starts) // rows)
    low = np.repeat(starts, count) + _count_on(np.zeros_like(count), count) * rows
    tiles = np.stack([low, np.minimum(low + rows, np.repeat(ends, count))], 1)
    return tiles[tiles[:, 0].argsort(kind="stable")]


def _hull(a: tuple[int, ...], b: list[int]) -> tuple[int, ...]:
    """Union hulls of two pairs of ranges (start, end, start, end)."""
    joined: list[int] = []
    for i in (0, 2):
        if a[i] == a[i + 1]:
            joined += b[i : i + 2]
        elif b[i] == b[i + 1]:
            joined += a[i : i + 2]
        else:
            joined += [min(a[i], b[i]), max(a[i + 1], b[i + 1])]
    return tuple(joined)


def _blocks(a0: int, a1: int, b0: int, b1: int, block: int) -> int:
    """Number of blocks that cover two ranges, which may overlap."""
    if a0 < a1 and b0 < b1 and max(a0, b0) <= min(a1, b1):
        return -(-(max(a1, b1) - min(a0, b0)) // block)
    return -(-(a1 - a0) // block) - (-(b1 - b0) // block)


# Ranges


def _crossings(tiles: Array, start: Array, end: Array) -> tuple[Array, Array]:
    """All pairs (tile, range) with rows in common; the tiles are sorted and disjoint, the ranges need not be."""
    first = np.searchsorted(tiles[:, 1], start, side="right")
    last = np.searchsorted(tiles[:, 0], end, side="left")
    count = np.where(end > start, np.maximum(last - first, 0), 0)
    owner = np.repeat(np.arange(len(start)), count)
    return _count_on(first, count), owner


def _count_on(first: Array, count: Array) -> Array:
    """Concatenation of ``count[i]`` consecutive numbers from ``first[i]`` on, for each i."""
    ends = count.cumsum()
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - count - first, count)


def _levels(tile: Array, weighted: list[tuple[Array, Array, Array]], needed: Array, axis: int) -> Array:
    """Ranges [n, 2] in which the weights of a tile's ranges (start, end, weight) sum to at least ``needed``.

    Coordinates are consecutive over all tiles: ``tile * axis + position`` with every position < axis.
    """
    starts, ends, weights = [], [], []
    for start, end, weight in weighted:
        starts.append(tile * axis + start)
        ends.append(tile * axis + np.maximum(start, end))
        weights.append(weight)
    places, index = np.unique(np.concatenate(starts + ends), return_inverse=True)
    if not len(places):
        return np.empty((0, 2), np.int64)
    rises = np.concatenate(weights).astype(np.float64)
    steps = np.bincount(index.ravel(), np.concatenate([rises, -rises]), len(places))
    enough = steps.cumsum().astype(np.int64) >= needed[places // axis]
    edges = np.flatnonzero(np.diff(enough, prepend=False, append=False))
    return places[np.minimum(edges, len(places) - 1)].reshape(-1, 2)


def _split_at(ranges: Array, position: int, axis: int) -> Array:
    """Split the ranges that cross ``position`` of their tile there."""
    cut = ranges[:, 0] // axis * axis + position
    crossing = (ranges[:, 0] < cut) & (cut < ranges[:, 1])
    left, right = ranges.copy(), ranges[crossing]
    left[crossing, 1] = right[:, 0] = cut[crossing]
    joined = np.concatenate([left, right])
    return joined[joined[:, 0].argsort(kind="stable")]


def _schedule(
    tiles: Array,
    seen: Array,
    full: Array,
    parts: Array,
    block: int,
    axis: int,
    boundary: int,
    limit: int,
    device: torch.device,
) -> Schedule:
    """Cut the visible ranges into blocks, and join consecutive blocks of a tile of the same kind into runs.

    No run crosses ``boundary``; neither do the ranges.
    """
    length = seen[:, 1] - seen[:, 0]
    count = -(-length // block)
    start = _count_on(np.zeros_like(count), count) * block + np.repeat(seen[:, 0], count)
    end = np.minimum(start + block, np.repeat(seen[:, 1], count))
    masked = np.ones(len(start), dtype=bool)
    if len(full):  # a whole block within one of the full ranges, which are sorted and disjoint, needs no mask
        candidate = np.searchsorted(full[:, 0], start, side="right") - 1
        masked = (end - start < block) | (candidate < 0) | (end > full[candidate, 1])
    owner = start // axis
    order = np.lexsort((start, masked, owner))
    start, end, masked, owner = start[order], end[order], masked[order], owner[order]
    item, owners = owner, np.arange(len(tiles))  # item of every block, and tile of every item
    if limit:  # a tile without blocks is an item too
        per_tile = np.bincount(owner, minlength=len(tiles))
        items = np.maximum(-(-per_tile // limit), 1)
        within = np.arange(len(owner)) - np.repeat(per_tile.cumsum() - per_tile, per_tile)
        item = (items.cumsum() - items)[owner] + within // limit
        owners = np.repeat(owners, items)
    fresh = np.ones(len(start), dtype=bool)
    fresh[1:] = (start[1:] != end[:-1]) | (masked[1:] != masked[:-1]) | (item[1:] != item[:-1])
    fresh |= start % axis == boundary
    heads = np.flatnonzero(fresh)
    tails = np.append(heads[1:], len(start)) - 1 if len(heads) else heads
    runs = np.stack([start[heads] % axis, end[tails] - owner[heads] * axis], 1)
    last = np.cumsum(np.bincount(item[heads], minlength=len(owners)))
    first = last - np.bincount(item[heads], minlength=len(owners))
    first_masked = first + np.bincount(item[heads][~masked[heads]], minlength=len(owners))
    table = np.stack([*tiles[owners].T, first, first_masked, last, parts[owners]], 1)
    order = np.argsort(-np.bincount(item, minlength=len(owners)), kind="stable")
    arrays = [table[order], runs]
    if len(owners) > len(tiles):
        pieces = np.append(np.searchsorted(owners, np.arange(len(tiles))), len(owners))
        arrays += [pieces, np.argsort(order, kind="stable")]
    return Schedule(*_tensors(arrays, device))


def _tensors(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Return int32 tensors of ``arrays`` on ``device``."""
    tensors = []
    for array in arrays:
        tensors.append(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32)))
    return tensors if device == CPU else all_to_device(tensors, device)
