"""Parts of an update dealt to processes, and memories cut to other streams."""

import random

import pytest
import torch

import dph
from dph.data.packing import fill
from dph.train.distributed import partition_bins, slice_memory_state


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_pair_is_dealt_once_and_evenly(size):
    rng = random.Random(size)
    for _ in range(200):
        sizes = [rng.randint(1, 100) for _ in range(size * rng.randint(1, 6))]
        bins = fill(sizes, rng.randint(100, 400))
        shares = [partition_bins(bins, sizes, rank, size) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(place for share in shares for places in share for place in places) == list(range(len(sizes)))
        assert all(any(set(places) <= set(whole) for whole in bins) for share in shares for places in share)


def test_one_process_has_the_bins_as_they_are():
    assert partition_bins([[0, 2], [1]], [1, 9, 1], 0, 1) == [[0, 2], [1]]


def test_what_is_at_work_together_is_alike():
    assert partition_bins([[0], [1], [2], [3]], [5, 80, 6, 90], 0, 2) == [[3], [2]]
    assert partition_bins([[0], [1], [2], [3]], [5, 80, 6, 90], 1, 2) == [[1], [0]]


def test_the_fullest_with_several_pairs_is_halved():
    shares = [partition_bins([[0], [1, 2, 3]], [99, 1, 2, 3, 4, 5], rank, 3) for rank in range(3)]
    assert sorted(places for share in shares for places in share) == [[0], [1, 3], [2]]


def memories(kind, cuts):
    """One run's memories, of ``cuts`` streams each, after three calls on 6 streams; their state under numbers."""
    found, start = {}, 0
    for streams in cuts:
        memory = dph.Memory(5, kind)
        for call in range(3):
            rows = torch.arange(6 * 4, dtype=torch.float32).view(6, 4)[start : start + streams] + 100 * call
            memory.begin([4] * streams)
            for layer in range(2):
                states = rows.reshape(-1, 1, 1) + 1000 * layer
                memory.read(layer, states)
                memory.keep(layer, *[states, -states][: 2 if kind == "kv" else 1])
            memory.end([4] * streams, 4)
        found |= {f"{start}/{key}": t for key, t in memory.state_dict().items()}
        start += streams
    return found


@pytest.mark.parametrize("kind", ["kv", "hidden"])
@pytest.mark.parametrize(("before", "after"), [([6], [2, 2, 2]), ([2, 2, 2], [3, 3]), ([1] * 6, [6]), ([3, 3], [3, 3])])
def test_memories_of_other_streams(kind, before, after):
    tensors, expected, start = memories(kind, before), memories(kind, after), 0
    for streams in after:
        state = slice_memory_state(tensors, start, streams)
        assert state.keys() == {key.split("/")[1] for key in expected}
        assert all(torch.equal(t, expected[f"{start}/{key}"]) for key, t in state.items())
        dph.Memory(5, kind).load_state_dict(state)
        start += streams


def test_memories_that_nothing_has_been_said_to():
    empty = {f"{start}/{key}": t for start in (0, 2) for key, t in dph.Memory(5).state_dict().items()}
    memory = dph.Memory(5)
    memory.load_state_dict(slice_memory_state(empty, 0, 4))
    assert memory.seen == []


def test_a_number_of_parts_names_memories_in_order_too():
    """The names of checkpoints that were written before streams named them."""
    tensors = memories("kv", [2, 2, 2])
    renamed = {f"{int(key.split('/')[0]) // 2}/{key.split('/')[1]}": t for key, t in tensors.items()}
    for name, t in slice_memory_state(renamed, 2, 4).items():
        assert torch.equal(t, slice_memory_state(tensors, 2, 4)[name])
