"""A memory's rings on the host: bit for bit those on the device, however late the copies come."""

import itertools

import pytest
import torch
from helpers.tiny import PAD, tiny_model, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dph
from dph.model import kv_ring_offload
from dph.model.kv_ring import DeviceRingBuffers
from dph.model.kv_ring_offload import CopyStream, HostRingBuffers

KINDS = ("kv", "hidden")
M = 8
WIDTHS = {
    "as long as the memory": [8] * 5,
    "shorter": [3] * 9,
    "longer": [13, 20, 9, 30],
    "mixed": [3, 13, 0, 1, 1, 6, 17, 8, 2, 9],
}


class Late(CopyStream):
    """A lane whose copies come as late as they may: when they are joined. Meanwhile nobody may change their source."""

    def submit(self, copies):
        self._held += [(to, source, source.clone()) for to, source in copies]

    def join(self):
        held, self._held = self._held, []
        for to, source, before in held:
            assert torch.equal(source, before)
            to.copy_(source)


@pytest.fixture(params=["fetching", "writing"])
def lanes(request, monkeypatch):
    """One of the two lanes as late as may be, the other at once."""
    turn = itertools.cycle([Late, CopyStream] if request.param == "fetching" else [CopyStream, Late])
    monkeypatch.setattr(kv_ring_offload, "CopyStream", lambda device: next(turn)(device))


def grid(counts, step):
    """Ids and mask [B, max]: row b has counts[b] tokens, padded on the right and on the left by turns."""
    width = max(counts)
    ids, mask = torch.full((len(counts), width), PAD), torch.zeros(len(counts), width, dtype=torch.int64)
    for b, count in enumerate(counts):
        first = b % 2 * (width - count)
        ids[b, first : first + count] = tokens(count, seed=10 * step + b)
        mask[b, first : first + count] = 1
    return ids, mask


def trained(model, memory, calls):
    """Logits of every call, the sum of all gradients, and the memory's state at the end."""
    model.zero_grad()
    found = []
    for step, counts in enumerate(calls):
        ids, mask = grid(counts, step)
        logits = model(ids, attention_mask=mask, past_key_values=memory).logits
        logits.square().sum().backward()
        found.append(logits.detach())
    found += [p.grad for p in model.parameters() if p.grad is not None]
    return found + [t.clone() for t in memory.state_dict().values()]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_places_compute_the_same(kind, widths, checkpointing, lanes, poisoned_empty):
    """Forward and backward, until the ring has turned more than once, state and all."""
    model = tiny_model()
    model.backbone.gradient_checkpointing = checkpointing
    calls = [[width, width] for width in WIDTHS[widths]]
    one, other = (trained(model, dph.Memory(M, kind, place), calls) for place in ("device", "host"))
    assert same(one, other)


def test_a_call_sees_the_same_rows_and_nothing_that_is_not_finite(poisoned_empty):
    """Kernels may load what they mask, so what holds no token is zero, as on the device."""
    one, other = DeviceRingBuffers(M, 2), HostRingBuffers(M, 2)
    seen, like = [0, 0], torch.zeros(0, 2, 4)
    for step, counts in enumerate([[3, 0], [2, 12], [20, 5], [1, 1]]):
        for rings in (one, other):
            rings.begin(seen, counts)
        windows = one.read(0, like), other.read(0, like)
        assert same(*windows)
        assert all(window.isfinite().all() for window in windows[1])
        rows = torch.randn(2, sum(counts), 2, 4, generator=torch.Generator().manual_seed(step)).unbind()
        for rings in (one, other):
            rings.store(0, rows)
            rings.end()
            assert rings.commit()
            assert not rings.commit()
        seen = [s + c for s, c in zip(seen, counts, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3).filter(any), min_size=1, max_size=6),
       st.integers(1, 7), st.booleans())  # fmt: skip
def test_streams_of_different_speed(kind, calls, length, checkpointing):
    model = tiny_model()
    model.backbone.gradient_checkpointing = checkpointing
    one, other = (trained(model, dph.Memory(length, kind, place), calls) for place in ("device", "host"))
    assert same(one, other)


def test_a_window_is_one_copy_where_a_segment_is_as_long_as_the_memory():
    model, memory = tiny_model(), dph.Memory(M, place="host")
    with torch.no_grad():
        for step in range(4):
            model(tokens(3, M, seed=step), past_key_values=memory)
            rings = memory._rings
            assert [span.rows for span in rings._window_spans] == ([3 * M] if step else [])
            assert [span.rows for span in rings._new_spans] == [3 * M]
    storage = memory._rings._layers[0][0].untyped_storage().data_ptr()
    assert memory.state_dict()["0.0"].untyped_storage().data_ptr() == storage


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [[5, 2], [8, 8, 8], [3, 20, 4]])
@pytest.mark.parametrize("places", [("device", "host"), ("host", "device")], ids="-to-".join)
def test_a_state_goes_on_in_the_other_place(places, before, kind, lanes):
    model = tiny_model()
    first, second = (dph.Memory(M, kind, place) for place in places)
    trained(model, first, [[n, n + 1] for n in before])
    second.load_state_dict(first.state_dict())
    calls = [[4, 9], [8, 8], [1, 0]]
    assert same(trained(model, second, calls), trained(model, first, calls))


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_selected_repeated_and_cropped(kind, lanes):
    model = tiny_model()
    changes = (
        lambda memory: memory.batch_select_indices(torch.tensor([2, 0])),
        lambda memory: memory.batch_repeat_interleave(2),
        lambda memory: memory.reorder_cache(torch.tensor([1, 1, 0])),
    )
    cases = [([[20, 3, 8], [2, 9, 8]], change) for change in changes]
    for calls, change in [*cases, ([[4, 1, 6]], lambda memory: memory.crop(-2))]:
        found = []
        for place in ("device", "host"):
            memory = dph.Memory(M, kind, place)
            trained(model, memory, calls)
            change(memory)
            found.append(trained(model, memory, [[3] * memory.batch_size, [7] * memory.batch_size]))
        assert same(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_fails_leaves_no_trace(kind, lanes, monkeypatch):
    model, found = tiny_model(num_hidden_layers=3), []
    for place in ("device", "host"):
        memory = dph.Memory(M, kind, place)
        trained(model, memory, [[3, 2], [2, 4]])
        with monkeypatch.context() as patch:
            patch.setattr(model.backbone.blocks[1], "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                trained(model, memory, [[7, 11]])
        memory.crop(-1)
        found.append(trained(model, memory, [[2, 6], [8, 8]]))
    assert same(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode_and_training_may_share_a_memory(kind, lanes):
    model, found = tiny_model(), []
    for place in ("device", "host"):
        memory = dph.Memory(M, kind, place)
        with torch.inference_mode():
            for step in range(2):
                model(tokens(2, 6, seed=step), past_key_values=memory)
        found.append(trained(model, memory, [[5, 5], [5, 5]]))
    assert same(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_on_the_host_outlives_the_next_call(kind):
    """What a backward pass needs is its own, unless it computes the call again."""
    model, pieces = tiny_model(), tokens(1, 12).split(4, 1)
    grads = []
    for place, late in (("device", False), ("host", False), ("host", True)):
        model.zero_grad()
        memory = dph.Memory(4, kind, place)
        losses = [model(piece, labels=piece, past_key_values=memory).loss for piece in pieces[:2]]
        if late:
            model(pieces[2], past_key_values=memory)
        losses[1].backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert same(grads[0], grads[1])
    assert same(grads[0], grads[2])
    model.backbone.gradient_checkpointing = True
    loss = model(pieces[0], labels=pieces[0], past_key_values=memory).loss
    model(pieces[1], past_key_values=memory)
    with pytest.raises(RuntimeError, match="expected a backward pass before the memory's next call"):
        loss.backward()


def test_the_next_layer_is_fetched_ahead():
    """In the forward pass the one behind, in the backward pass the one before; of no other layer is a window held."""
    model, memory, held = tiny_model(num_hidden_layers=3), dph.Memory(4, place="host"), []
    model.backbone.gradient_checkpointing = True
    trained(model, memory, [[4]])
    read = HostRingBuffers.read

    def watched(self, layer, like):
        found = read(self, layer, like)
        held.append((layer, *sorted(self._windows)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostRingBuffers, "read", watched)
        loss = model(tokens(1, 4), past_key_values=memory).logits.sum()
        assert held == [(0, 0, 1), (1, 1, 2), (2, 2)]
        loss.backward()
        assert held[3:] == [(2, 1, 2), (1, 0, 1), (0, 0)]
    memory.commit()
    assert not memory._rings._windows


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="place: expected one of 'device', 'host', got 'disk'"):
        dph.Memory(4, place="disk")
    memory = dph.Memory(10**12, place="host")
    with pytest.raises(MemoryError, match=r"memory: expected 128,000.00 GB of the host's memory .*, got .* GB at most"):
        tiny_model()(tokens(1, 2), past_key_values=memory)


# On a GPU


@pytest.fixture(scope="module")
def large():
    """A model large enough that its copies take their time."""
    torch.manual_seed(0)
    config = dph.ModelConfig(
        vocab_size=512, embedding_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=8, reward_heads=(),
    )  # fmt: skip
    return dph.Model(config).to("cuda", torch.bfloat16)


def figures(model, memory, widths, seed):
    """Losses, gradients and state after calls of ``widths``."""
    model.zero_grad()
    losses = []
    for step, width in enumerate(widths):
        ids = torch.randint(512, (4, width), generator=torch.Generator().manual_seed(100 * seed + step)).cuda()
        loss = -model.stream_logprobs(ids, ids.roll(-1, 1), memory).sum()
        loss.backward()
        losses.append(loss.detach())
    state = {key: tensor.cpu() for key, tensor in memory.state_dict().items()}
    return [*losses, *(p.grad for p in model.parameters() if p.grad is not None), *state.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_both_places_compute_the_same_on_a_gpu(kind, checkpointing, large):
    """Twenty times, so that a copy that comes too late or too early has its chance."""
    large.backbone.gradient_checkpointing = checkpointing
    for seed in range(20):
        widths = [1024, 1024, 1024] if seed % 2 else [300, 1500, 1024, 7]
        one, other = (figures(large, dph.Memory(1024, kind, place), widths, seed) for place in ("device", "host"))
        assert same(one, other)


@pytest.mark.gpu
def test_copies_run_beside_computing(large):
    memory = dph.Memory(1024, place="host")
    with torch.no_grad():
        for seed in range(2):
            ids = torch.randint(512, (4, 1024), generator=torch.Generator().manual_seed(seed)).cuda()
            large(ids, past_key_values=memory)
    memory.begin([1024] * 4)
    rings, like = memory._rings, torch.empty(0, 8, 64, device="cuda", dtype=torch.bfloat16)
    assert all(ring.is_pinned() for layer in rings._layers for ring in layer)
    torch.cuda.synchronize()
    rings.read(0, like)
    torch.cuda._sleep(2 * 10**9)  # cycles: a second
    rings._prefetch._stream.synchronize()
    assert not torch.cuda.current_stream().query()
    assert sorted(rings._windows) == [0, 1]
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_memory_on_the_host_takes_none_of_the_gpu(kind, large):
    """Of eight memories that take turns, the device holds windows of one part and of two layers."""
    large.backbone.gradient_checkpointing = True
    peaks = {}
    for place in ("device", "host"):
        memories = [dph.Memory(4096, kind, place) for _ in range(8)]
        figures(large, dph.Memory(4096, kind, place), [512], 0)  # gradients, and whatever else is made once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            for memory in memories:
                ids = torch.randint(512, (4, 512)).cuda()
                large.stream_logprobs(ids, ids, memory).sum().backward()
                memory.commit()
        peaks[place] = torch.cuda.max_memory_allocated() - before
        del memories, memory
    rings = (2 if kind == "kv" else 1) * 8 * 6 * 4 * 4096 * 512 * 2
    assert peaks["device"] > rings
    assert peaks["host"] < peaks["device"] - 0.7 * rings


@pytest.mark.parametrize("counts", [[8, 8], [3, 5, 0, 8, 1], [13, 20, 3, 16], [0], [1] * 11])
def test_streams_alike_are_written_as_any_others(counts, monkeypatch):
    alike, any_others = DeviceRingBuffers(M, 2), DeviceRingBuffers(M, 2)
    monkeypatch.setattr(any_others, "_slice_writer", any_others._row_writer)
    seen, generator = 0, torch.Generator().manual_seed(0)
    for count in counts:
        both = torch.randn(3 * count, 2, 5, generator=generator)
        for rings in (alike, any_others):
            rings.begin([seen] * 3, [count] * 3)
            rings.read(0, both[:, 0])
            rings.store(0, (both[:, 0], both[:, 1].double()))  # rows that do not lie end to end, and of another dtype
            rings.end()
            rings.commit()
        seen += count
        for one, other in zip(alike.state([])[0], any_others.state([])[0], strict=True):
            assert torch.equal(one, other)
