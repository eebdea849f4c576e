"""Memory: what a stream has seen, against the definition and against one long sequence."""

import pytest
import torch
from helpers.tiny import PAD, naive, naive_logits, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import dph

KINDS = ("kv", "hidden")
pytestmark = pytest.mark.usefixtures("every_kernel")


def segments_of(model, pieces, memory):
    """Logits [B, S, V] of pieces [B, s] fed one after another."""
    with torch.no_grad():
        return torch.cat([model(piece, past_key_values=memory).logits for piece in pieces], 1)


# Numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reverse", [True, False])
def test_segments_equal_one_sequence_while_it_all_fits(kind, reverse):
    model, ids = tiny_model(rope_reversed=reverse), tokens(3, 40)
    whole = model(ids).logits
    parts = segments_of(model, ids.split([1, 17, 0, 2, 20], 1), dph.Memory(40, kind))
    torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 5, 8, 13])
@pytest.mark.parametrize("widths", [[8, 8, 8, 8], [1] * 20, [20, 3, 1, 9], [3, 13, 1, 1, 6]])
def test_sliding_follows_the_definition(kind, length, widths):
    """Old keys leave in order, whatever the widths of the segments: a full ring, a turned one, one written over."""
    model, ids = tiny_model(), tokens(1, sum(widths))
    got = segments_of(model, ids.split(widths, 1), dph.Memory(length, kind))[0]
    memory, expected = None, []
    for piece in ids[0].split(widths):
        hidden, memory = naive(model, piece, memory, length, kind)
        expected.append(naive_logits(model, hidden))
    torch.testing.assert_close(got.double(), torch.cat(expected), rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=2, max_size=2), min_size=1, max_size=6), st.integers(1, 7))
def test_streams_of_different_speed_do_not_meet(kind, widths, length):
    """Padding on either side is neither computed nor remembered: a padded stream is the stream alone."""
    model, memory = tiny_model(), dph.Memory(length, kind)
    alone = [dph.Memory(length, kind) for _ in range(2)]
    for step, counts in enumerate(widths):
        width = max(counts)
        if width == 0:
            continue
        ids, mask = torch.full((2, width), PAD), torch.zeros(2, width, dtype=torch.int64)
        for b, n in enumerate(counts):
            left = b * (width - n)  # stream 0 is padded on the right, stream 1 on the left
            ids[b, left : left + n] = tokens(n, seed=10 * step + b)
            mask[b, left : left + n] = 1
        with torch.no_grad():
            logits = model(ids, attention_mask=mask, past_key_values=memory).logits
        assert (logits[mask == 0] == 0).all()
        for b, n in enumerate(counts):
            expected = segments_of(model, [tokens(1, n, seed=10 * step + b)], alone[b])[0]
            torch.testing.assert_close(logits[b][mask[b].bool()], expected, rtol=0, atol=2e-5)
    assert memory.seen == ([sum(c) for c in zip(*widths, strict=True)] if memory.is_initialized else [])


def test_positions_may_roll_on_without_end():
    """A stream that is ten million tokens old speaks as a young one does."""
    model, ids, length = tiny_model(), tokens(1, 20), 4
    young, old = dph.Memory(length), dph.Memory(length)
    old.seen = [10**7]  # with nothing in its ring, which two layers of four tokens each have forgotten after eight
    got, expected = (segments_of(model, ids.split(1, 1), memory) for memory in (old, young))
    assert old.seen == [10**7 + 20]
    torch.testing.assert_close(got[:, 10:], expected[:, 10:], rtol=0, atol=2e-5)


# Gradients


@pytest.mark.parametrize("kind", KINDS)
def test_backward_through_a_call_with_memory_and_then_the_next(kind):
    """What a call adds is written at the start of the next one, so a backward pass in between reads the old rows."""
    model, ids, memory = tiny_model(), tokens(2, 24), dph.Memory(6, kind)
    for piece in ids.split(6, 1):
        model.zero_grad()
        loss = model(piece, labels=piece, past_key_values=memory).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if not n.startswith("heads."))


def test_gradients_are_those_of_a_detached_memory():
    """fp64 finite differences, the memory held as it is."""
    model, ids = tiny_model().double(), tokens(1, 10)
    memory = dph.Memory(6)
    segments_of(model, [ids[:, :6]], memory)
    state = memory.state_dict()

    def loss():
        again = dph.Memory(6)
        again.load_state_dict(state)
        return model(ids[:, 6:], labels=ids[:, 6:], past_key_values=again).loss

    weight = model.backbone.blocks[0].attention.qkv.weight
    loss().backward()
    for row, column in ((0, 3), (20, 5), (40, 15)):  # of q, k and v
        with torch.no_grad():
            weight[row, column] += 1e-6
            above = loss()
            weight[row, column] -= 2e-6
            below = loss()
            weight[row, column] += 1e-6
        assert weight.grad[row, column].item() == pytest.approx(((above - below) / 2e-6).item(), rel=1e-5)


def test_only_the_hidden_kind_teaches_the_projections_through_memory():
    """One new token that sees three old ones: with "hidden", W_k learns from their rows as well."""
    grads = {}
    for kind in KINDS:
        model, memory = tiny_model(num_hidden_layers=1), dph.Memory(8, kind)
        segments_of(model, [tokens(1, 3)], memory)
        model(tokens(1, 2, seed=1), past_key_values=memory).logits[:, -1].logsumexp(-1).sum().backward()
        grads[kind] = model.backbone.blocks[0].attention.qkv.weight.grad
    assert not torch.allclose(grads["kv"][16:], grads["hidden"][16:], atol=1e-3)
    torch.testing.assert_close(grads["kv"][:16], grads["hidden"][:16], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(kind):
    """Gradients and memory, bit for bit, over segments; the rows that are computed again are not kept twice."""
    found = []
    for again in (False, True):
        model, ids, memory = tiny_model(), tokens(2, 15), dph.Memory(7, kind)
        model.backbone.gradient_checkpointing = again
        for part in ids.split(5, 1):
            model(part, labels=part, past_key_values=memory).loss.backward()
            assert not memory._rings.in_call
        found.append([*(p.grad for p in model.parameters() if p.grad is not None), *memory.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_transformers_switches_gradient_checkpointing():
    model, ids = tiny_model(), tokens(2, 15)
    blocks = []
    model.backbone.blocks[0].register_forward_pre_hook(lambda *_: blocks.append(1))
    switch = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch()
    model(ids, labels=ids).loss.backward()
    assert len(blocks) == 2
    with torch.no_grad():
        model(ids)
    assert len(blocks) == 3


@pytest.mark.parametrize("commit", ["by hand", "by the next call"])
@pytest.mark.parametrize(
    ("kind", "again", "message"),
    [
        ("kv", False, "modified by an inplace operation"),
        ("kv", True, "expected a backward pass before the memory's next call"),
        ("hidden", True, "expected a backward pass before the memory's next call"),
    ],
)
def test_writing_before_backward_is_noticed(kind, again, message, commit):
    model, ids, memory = tiny_model(), tokens(1, 12), dph.Memory(4, kind)
    model.backbone.gradient_checkpointing = again
    segments_of(model, [ids[:, :4]], memory)
    loss = model(ids[:, 4:8], labels=ids[:, 4:8], past_key_values=memory).loss
    if commit == "by hand":
        memory.commit()
    else:
        segments_of(model, [ids[:, 8:]], memory)
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_inference_mode_and_training_may_share_a_memory():
    model, ids = tiny_model(), tokens(1, 12)
    for kind in KINDS:
        memory = dph.Memory(4, kind)
        with torch.inference_mode():
            model(ids[:, :4], past_key_values=memory)
            model(ids[:, 4:8], past_key_values=memory)
        model(ids[:, 8:], labels=ids[:, 8:], past_key_values=memory).loss.backward()
        expected = dph.Memory(4, kind)
        segments_of(model, ids.split(4, 1), expected)
        for got, want in zip(memory.state_dict().values(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(got, want)


# Bookkeeping


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    model, ids, memory = tiny_model(), tokens(2, 30), dph.Memory(8, kind)
    segments_of(model, ids[:, :20].split(5, 1), memory)
    save_file(memory.state_dict(), tmp_path / "memory.safetensors")
    again = dph.Memory(8, kind)
    again.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    assert repr(again) == repr(memory) == f"Memory(length=8, kind='{kind}', streams=2, columns=20)"
    pieces = ids[:, 20:].split(5, 1)
    assert torch.equal(segments_of(model, pieces, again), segments_of(model, pieces, memory))


def test_a_loaded_memory_is_a_copy():
    model, memory, again = tiny_model(), dph.Memory(4), dph.Memory(4)
    segments_of(model, [tokens(1, 4)], memory)
    again.load_state_dict(memory.state_dict())
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    segments_of(model, [tokens(1, 4, seed=1)], again)
    again.commit()
    assert all(torch.equal(before[name], tensor) for name, tensor in memory.state_dict().items())


def test_an_unused_memory_has_a_state_too():
    again = dph.Memory(4)
    again.load_state_dict(dph.Memory(4).state_dict())
    assert (len(again), again.batch_size, again.is_initialized) == (0, -1, False)


def test_another_length_is_refused():
    model, memory = tiny_model(), dph.Memory(4)
    segments_of(model, [tokens(1, 4)], memory)
    with pytest.raises(ValueError, match="memory: expected a length of 5 and the kind 'kv', got 4 and 'kv'"):
        dph.Memory(5).load_state_dict(memory.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_does_not_fit_leaves_the_memory_as_it_was(kind):
    model, memory = tiny_model(), dph.Memory(4, kind)
    segments_of(model, [tokens(2, 3)], memory)
    state, other = memory.state_dict(), next(k for k in KINDS if k != kind)
    wrong = [
        (other, state, f"the kind '{other}', got 4 and '{kind}'"),
        (kind, {k: v for k, v in state.items() if k != "kind"}, "memory: expected a state with kind, got seen"),
        (kind, state | {"seen": torch.tensor([3])}, r"memory: expected \[1, 4\] streams and tokens, got \[\[2, 4\]"),
    ]
    for taken, broken, text in wrong:
        again = dph.Memory(4, taken)
        segments_of(model, [tokens(1, 2)], again)
        with pytest.raises(ValueError, match=text):
            again.load_state_dict(broken)
        assert (again.seen, len(again)) == ([2], 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("removed", [0, 1, 7])
def test_crop_takes_the_newest_tokens_back(kind, removed):
    model, ids, memory = tiny_model(), tokens(2, 16), dph.Memory(16, kind)
    segments_of(model, [ids[:, :10]], memory)
    memory.crop(-removed)
    assert memory.get_seq_length() == 10 - removed
    expected = model(torch.cat([ids[:, : 10 - removed], ids[:, 10:]], 1)).logits[:, 10 - removed :]
    torch.testing.assert_close(segments_of(model, [ids[:, 10:]], memory), expected, rtol=0, atol=2e-5)


def test_crop_by_a_positive_number_or_past_the_ring_is_refused():
    model, memory = tiny_model(), dph.Memory(8)
    segments_of(model, [tokens(1, 8)], memory)
    with pytest.raises(ValueError, match="tokens_to_remove: expected minus the number of tokens, got 2"):
        memory.crop(2)
    assert memory.is_croppable
    segments_of(model, [tokens(1, 1)], memory)
    assert not memory.is_croppable
    memory.crop(0)
    with pytest.raises(ValueError, match="crop: expected streams of at most 8 tokens, got 9"):
        memory.crop(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_reordered_selected_and_repeated(kind):
    model, ids, tail = tiny_model(), tokens(3, 9), tokens(1, 4, seed=5)
    order = torch.tensor([2, 0, 0, 1])

    def continued(change, rows):
        memory = dph.Memory(6, kind)
        segments_of(model, ids.split(3, 1), memory)
        change(memory)
        assert memory.batch_size == len(rows)
        got = segments_of(model, [tail.expand(len(rows), -1)], memory)
        for row, logits in zip(rows, got, strict=True):
            alone = dph.Memory(6, kind)
            segments_of(model, ids[row : row + 1].split(3, 1), alone)
            torch.testing.assert_close(logits, segments_of(model, [tail], alone)[0], rtol=0, atol=2e-5)

    continued(lambda memory: memory.reorder_cache(order), order.tolist())
    continued(lambda memory: memory.batch_select_indices(torch.tensor([1])), [1])
    continued(lambda memory: memory.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])


def test_an_unused_memory_takes_no_order():
    memory = dph.Memory(4)
    memory.reorder_cache(torch.tensor([1, 0]))
    memory.batch_repeat_interleave(3)
    memory.crop(-2)
    assert (memory.seen, memory.columns) == ([], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets(kind):
    model, ids, memory = tiny_model(), tokens(1, 6), dph.Memory(6, kind)
    first = segments_of(model, [ids], memory)
    memory.reset()
    assert torch.equal(segments_of(model, [ids], memory), first)
    memory.reset()
    assert segments_of(model, [tokens(3, 2)], memory).shape[0] == 3  # and the batch size with it


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_that_fails_leaves_no_trace(kind, monkeypatch):
    model, ids, memory = tiny_model(), tokens(1, 12), dph.Memory(8, kind)
    segments_of(model, [ids[:, :4]], memory)
    with monkeypatch.context() as patch:
        patch.setattr(model.backbone.blocks[1], "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 5:], past_key_values=memory)
    expected = model(ids).logits[:, 4:]
    torch.testing.assert_close(segments_of(model, [ids[:, 4:]], memory), expected, rtol=0, atol=2e-5)


def test_what_transformers_asks():
    model, memory = tiny_model(), dph.Memory(8)
    assert (memory.get_seq_length(), memory.get_max_length(), memory.is_compileable) == (0, -1, False)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model(tokens(2, 6), attention_mask=mask, past_key_values=memory)
    assert (memory.seen, memory.get_seq_length(), len(memory)) == ([4, 6], 6, 2)
    assert memory.get_mask_sizes(3) == (9, 0)
    model(tokens(2, 6), past_key_values=memory)
    assert memory.get_mask_sizes(1) == (9, 4)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_and_segments(batch, kind):
    model, memory = tiny_model(), dph.Memory(4, kind)
    for width in (3, 0, 1):
        assert model(tokens(batch, width), past_key_values=memory).logits.shape == (batch, width, 61)


# Errors


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="length: expected at least 1 token, got 0"):
        dph.Memory(0)
    with pytest.raises(ValueError, match="kind: expected one of 'kv', 'hidden', got 'keys'"):
        dph.Memory(4, "keys")
    model, memory = tiny_model(), dph.Memory(4)
    segments_of(model, [tokens(2, 3)], memory)
    with pytest.raises(ValueError, match="past_key_values: expected a batch of 2 streams, got 3"):
        model(tokens(3, 3), past_key_values=memory)
    for layers in (1, 3):
        text = f"past_key_values: expected a memory of {layers} layers, got one of 2"
        with pytest.raises(ValueError, match=text):
            tiny_model(num_hidden_layers=layers)(tokens(2, 3), past_key_values=memory)
    for other in (DynamicCache(), ((torch.zeros(1), torch.zeros(1)),)):
        with pytest.raises(ValueError, match=r"past_key_values: expected dph.Memory, got (DynamicCache|tuple)"):
            model(tokens(2, 3), past_key_values=other)
