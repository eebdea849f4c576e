"""Inside of ``dispatch.batch_invariant`` a row's result does not depend on the other rows, bit by bit."""

import pytest
import torch

from dph_kernels import dispatch, residual_norm, rope_attention, swiglu
from dph_kernels.layout import PackedLayout, Rotary

ROPE = Rotary()


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def attention(segments, q, memory):
    """Attention of queries whose keys are all in the memory."""
    layout = PackedLayout(torch.tensor(segments), queries=len(q), keys=0, memory=len(memory[0]))
    with dispatch.batch_invariant():
        return rope_attention(q, memory[0][:0], memory[0][:0], layout, rope=ROPE, memory=memory)


@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(2, 2, 8), (9, 3, 64), (8, 1, 16), (32, 2, 10)])
def test_each_candidate_is_computed_as_alone(heads, key_heads, head_dim):
    """Candidates of two prompts, of many lengths, and rows of padding between them."""
    q, memory = drawn(24, heads, head_dim), tuple(drawn(900, key_heads, head_dim, seed=seed) for seed in (1, 2))
    segments = []
    for i in range(22):
        start, end = (0, 150) if i < 13 else (151, 170)
        own, said = 180 + 32 * i, 1 + (7 * i) % 31
        segments.append((i, i + 1, own, own + said, start, end, end - start + said - 1))
    together = attention(segments, q, memory)
    assert not together[22:].any()
    for segment in segments:
        i = segment[0]
        assert torch.equal(attention([(0, 1, *segment[2:])], q[i : i + 1], memory)[0], together[i])
    layout = PackedLayout(torch.tensor(segments), queries=24, keys=0, memory=900)
    expected = rope_attention(q, memory[0][:0], memory[0][:0], layout, rope=ROPE, memory=memory, backend="reference")
    assert together == pytest.approx(expected, abs=1e-5)


def test_each_document_is_computed_as_alone():
    """Documents that end within a block, with one that is longer than a tile."""
    lengths = [15, 1, 30, 200, 0, 64, 7]
    q, k, v = (drawn(sum(lengths), 4, 16, seed=seed) for seed in range(3))
    with dispatch.batch_invariant():
        together = rope_attention(q, k, v, PackedLayout.documents(lengths), rope=ROPE)
        start = 0
        for length in lengths:
            own = slice(start, start + length)
            alone = rope_attention(q[own], k[own], v[own], PackedLayout.documents([length]), rope=ROPE)
            assert torch.equal(alone, together[own])
            start += length


@pytest.mark.parametrize("rows", [1, 16, 400])
def test_few_rows_have_the_bits_of_many(rows):
    x, update, weight = drawn(2000, 128), drawn(2000, 128, seed=1), drawn(128, seed=2)
    with dispatch.batch_invariant():
        for kind in ("layer", "rms"):
            many = residual_norm(x, update, weight, None, kind=kind)
            few = residual_norm(x[:rows], update[:rows], weight, None, kind=kind)
            assert all(torch.equal(a, b[:rows]) for a, b in zip(few, many, strict=True))
        assert torch.equal(swiglu(x[:rows]), swiglu(x)[:rows])
    assert not dispatch.is_batch_invariant()
