"""The schedule against the mask: every visible pair is visited once, full blocks hold no hidden one."""

import random
import time

import pytest
import torch
from helpers.attention import LAYOUTS

from dph_kernels import PackedLayout
from dph_kernels.rope_attention import schedule
from dph_kernels.rope_attention.schedule import content_of

CPU = torch.device("cpu")


def seen_from_bounds(bounds, keys):
    j = torch.arange(keys)
    lo, hi, p0, p1 = bounds[:, :, None].unbind(1)
    return ((lo <= j) & (j < hi)) | ((p0 <= j) & (j < p1))


def visits(work, mask, rows, block, boundary=0):
    """How often each pair [rows, columns] of ``mask`` is visited; checks every tile and run on the way."""
    counts, owners = torch.zeros(mask.shape, dtype=torch.int32), torch.zeros(mask.shape[0], dtype=torch.int32)
    blocks = []
    for start, end, first, first_masked, last, parts in work.tiles.tolist():
        assert 0 < end - start <= rows
        owners[start:end] += 1
        blocks.append(0)
        assert first <= first_masked <= last
        for number, (a, b) in enumerate(work.runs[first:last].tolist(), first):
            assert a < b
            assert not a < boundary < b
            seen = mask[start:end, a:b]
            if number < first_masked:
                assert (b - a) % block == 0
                assert seen.all()
            blocks[-1] += -(-(b - a) // block)
            assert all(seen[:, i : i + block].any() for i in range(0, b - a, block)), "a block that nobody needs"
            counts[start:end, a:b] += seen
        assert parts or not mask[start:end].any()
    assert blocks == sorted(blocks, reverse=True)
    return counts, owners


def check(layout, rows, block, limit=0):
    mask = layout.visible()
    bounds = schedule.bounds(content_of(layout.segments), layout.queries, device=CPU)
    assert torch.equal(seen_from_bounds(bounds, mask.shape[1]), mask)
    work = schedule.by_queries(
        content_of(layout.segments), layout.queries, layout.memory, rows=rows, block=block, limit=limit, device=CPU
    )
    counts, owners = visits(work, mask, rows, block, layout.memory)
    assert torch.equal(counts, mask.int())
    check_components(layout, mask, rows, block)
    assert work.split == bool((owners > 1).any())
    if not work.split:
        assert (owners == 1).all()
    else:
        groups = [work.order[a:b] for a, b in zip(work.pieces[:-1].tolist(), work.pieces[1:].tolist(), strict=True)]
        assert torch.equal(torch.cat(groups).sort().values, torch.arange(len(work.tiles), dtype=torch.int32))
        for group in groups:
            assert len(work.tiles[group.long(), :2].unique(dim=0)) == 1
    work = schedule.by_keys(
        content_of(layout.segments), layout.queries, layout.keys, layout.memory, rows=rows, block=block, device=CPU
    )
    counts, owners = visits(work, mask[:, layout.memory :].T, rows, block)
    assert torch.equal(counts, mask[:, layout.memory :].T.int())
    assert (owners == 1).all()


def check_components(layout, mask, rows, block):
    """Every tile in one task, and no new key in two: threads add to the gradients of keys side by side."""
    sizes = {"rows": rows, "block": block, "device": CPU}
    work, tasks = schedule.by_component(content_of(layout.segments), layout.queries, layout.memory, **sizes)
    whole = schedule.by_queries(content_of(layout.segments), layout.queries, layout.memory, **sizes)
    assert sorted(work.tiles.tolist()) == sorted(whole.tiles.tolist())
    assert (tasks[0], tasks[-1]) == (0, len(work.tiles))
    visited = torch.zeros(mask.shape[1] - layout.memory, dtype=torch.int32)
    for first, last in zip(tasks[:-1].tolist(), tasks[1:].tolist(), strict=True):
        seen = [mask[start:end, layout.memory :].any(0) for start, end in work.tiles[first:last, :2].tolist()]
        visited += torch.stack(seen).any(0)
    assert (visited <= 1).all()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("rows", "block"), [(16, 16), (64, 32), (32, 64)])
@pytest.mark.parametrize("limit", [0, 2])
def test_every_layout(name, rows, block, limit):
    check(LAYOUTS[name], rows, block, limit)


@pytest.mark.parametrize("limit", [0, 1])
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_device_gets_what_the_cpu_has(device, limit):
    layout = PackedLayout.shared_prefix([70, 3], [[40, 9], [30]])
    sizes = {"rows": 16, "block": 16, "limit": limit}
    here, there = (
        schedule.by_queries(
            content_of(layout.segments), layout.queries, layout.memory, **sizes, device=torch.device(each)
        )
        for each in ("cpu", device)
    )
    assert here.split == there.split == (limit > 0)
    for own, sent in zip(here, there, strict=True):
        if own is not None:
            assert (sent.device.type, sent.shape, sent.dtype) == (device, own.shape, own.dtype)
            assert device == "meta" or torch.equal(sent.cpu(), own)


@pytest.mark.parametrize("seed", range(40))
def test_random_layouts(seed):
    rng = random.Random(seed)
    prompts = [rng.choice([0, 1, rng.randint(1, 90)]) for _ in range(rng.randint(1, 6))]
    branches = [[rng.randint(0, 40) for _ in range(rng.randint(0, 5))] for _ in prompts]
    check(PackedLayout.shared_prefix(prompts, branches), rng.choice([8, 16, 64]), rng.choice([8, 16, 64]))
    streams = rng.randint(1, 5)
    filled = [rng.randint(0, 50) for _ in range(streams)]
    layout = PackedLayout.with_memory([rng.randint(0, 60) for _ in range(streams)], filled, 50)
    check(layout, rng.choice([8, 16, 64]), rng.choice([8, 16, 64]), rng.choice([0, 1, 3]))


class Table:
    """Any table of ranges: the schedule does not look at positions, which an arbitrary one has not."""

    visible = PackedLayout.visible

    def __init__(self, rng):
        self.memory, self.keys, self.queries = rng.choice([0, rng.randint(1, 100)]), rng.randint(0, 120), 0
        total, rows = self.memory + self.keys, []
        for _ in range(rng.randint(1, 7)):
            start = self.queries + rng.choice([0, rng.randint(0, 5)])
            self.queries = start + rng.choice([0, 1, rng.randint(1, 70)])
            a, b, c, d = sorted(rng.randint(0, total) for _ in range(4))
            own, prefix = rng.choice([((a, b), (c, d)), ((c, d), (a, b))])
            rows.append((start, self.queries, *own, *prefix, 0))
        self.segments = torch.tensor(rows)


@pytest.mark.parametrize("seed", range(60))
def test_any_table(seed):
    rng = random.Random(seed)
    check(Table(rng), rng.choice([8, 16, 64]), rng.choice([8, 16, 64]), rng.choice([0, 1, 3]))


@pytest.mark.parametrize("filled", [25, 64, 128])
def test_no_run_crosses_from_a_full_memory_to_the_new_keys(filled):
    check(PackedLayout.with_memory([70], [filled], filled), 64, 64)


def test_branches_share_the_tiles_of_their_prompt():
    """16 candidates of 4 tokens on a prompt of 256: one tile of queries, which walks through the prompt once."""
    layout = PackedLayout.shared_prefix([256], [[4] * 16])
    work = schedule.by_queries(content_of(layout.segments), layout.queries, 0, rows=64, block=64, device=CPU)
    assert sorted(work.tiles[:, :2].tolist()) == [[0, 64], [64, 128], [128, 192], [192, 256], [256, 320]]
    last = max(work.tiles.tolist())
    assert work.runs[last[2] : last[3]].tolist() == [[0, 256]]
    assert work.runs[last[3] : last[4]].tolist() == [[256, 320]]


def test_a_key_of_the_prompt_hears_from_its_branches_in_one_run():
    layout = PackedLayout.shared_prefix([64], [[30, 50, 48]])
    work = schedule.by_keys(content_of(layout.segments), layout.queries, layout.keys, 0, rows=64, block=64, device=CPU)
    (first,) = (t for t in work.tiles.tolist() if t[0] == 0)
    assert work.runs[first[2] : first[3]].tolist() == [[64, 192]]
    assert work.runs[first[3] : first[4]].tolist() == [[0, 64]]


def test_streams_keep_their_tiles_apart():
    """One new token each on four memories: a program each, instead of one that walks through all of them."""
    layout = PackedLayout.with_memory([1] * 4, [500] * 4, 512)
    work = schedule.by_queries(
        content_of(layout.segments), layout.queries, layout.memory, rows=64, block=64, device=CPU
    )
    assert sorted(work.tiles[:, :2].tolist()) == [[i, i + 1] for i in range(4)]


def test_short_documents_share_a_tile():
    layout = PackedLayout.documents([10] * 6)
    work = schedule.by_queries(content_of(layout.segments), layout.queries, 0, rows=64, block=64, device=CPU)
    assert work.tiles[:, :2].tolist() == [[0, 60]]


def test_positions_do_not_matter_and_nothing_is_computed_twice():
    """Streams roll on: the same schedule, the same tensors."""
    a, b = (PackedLayout.with_memory([8], [16], 16, [seen]) for seen in (16, 24))
    works = [schedule.by_queries(content_of(x.segments), 8, 16, rows=64, block=64, device=CPU) for x in (a, b)]
    assert works[0] is works[1]


def test_a_large_layout_does_not_take_long():
    layout = PackedLayout.shared_prefix([300] * 500, [[20, 30, 40]] * 500)
    best = float("inf")
    for queries in (layout.queries, layout.queries + 1):  # another key of the cache
        start = time.process_time()
        schedule.by_queries(content_of(layout.segments), queries, 0, rows=128, block=64, device=CPU)
        best = min(best, time.process_time() - start)
    assert best < 2  # seconds of this process, 0.1 when the test was written
