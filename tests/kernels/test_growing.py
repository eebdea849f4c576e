"""Decoding with bounds on the device: the attention of a layout that the host makes anew for every token."""

import numpy as np
import pytest
import torch
from helpers.attention import ROPE

from dph_kernels import PackedLayout, dispatch, rope_attention
from dph_kernels.rope_attention.growing import GrowingLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [
    pytest.param(
        backend,
        marks=pytest.mark.skipif(bool(reason), reason=reason or ""),
    )
    for backend in ("reference", "triton")
    for reason in [dispatch.missing("rope_attention", backend, DEVICE)]
]
ROWS, PADDED = 700, 9
PROMPTS = np.array([[5, 205], [5, 205], [300, 301], [5, 205], [310, 310], [305, 309]])
OWN = np.array([[210, 211], [240, 247], [320, 323], [280, 281], [400, 465], [500, 501]])


def tensors(heads, key_heads, head_dim):
    generator = torch.Generator().manual_seed(0)
    shapes = (PADDED, heads, head_dim), (ROWS, key_heads, head_dim), (ROWS, key_heads, head_dim)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def of_the_host(own, prompts, q, memory, count):
    """The attention of the first ``count`` queries, by a layout of the host."""
    number = np.arange(len(own))
    lengths = np.diff(prompts)[:, 0] + np.diff(own)[:, 0] - 1
    table = np.stack([number, number + 1, *own.T, *prompts.T, lengths], 1)
    layout = PackedLayout(torch.from_numpy(table), count, 0, ROWS).to(DEVICE)
    new = memory[0][:0]
    return rope_attention(q[:count], new, new, layout, rope=ROPE, memory=memory)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "key_heads", "head_dim"), [(2, 2, 16), (6, 2, 34), (4, 1, 64)])
def test_every_step_is_that_of_a_layout_of_the_host(backend, heads, key_heads, head_dim):
    """Across blocks of keys, with sequences that stop, padding, one key of its own, and an empty prompt."""
    q, *memory = tensors(heads, key_heads, head_dim)
    layout, own, count = GrowingLayout(PADDED, ROWS, torch.device(DEVICE)), OWN.copy(), len(OWN)
    layout.load(own, PROMPTS, own[:, 1] + 40)
    for step in range(40):
        active = np.arange(PADDED) % 3 != step % 3
        if step in (0, 1, 30, 39):
            out = rope_attention(q, q[:0], q[:0], layout, rope=ROPE, memory=memory, backend=backend)
            torch.testing.assert_close(out[:count], of_the_host(own, PROMPTS, q, memory, count))
            assert not out[count:].any()
        layout.advance(torch.from_numpy(active).to(DEVICE))
        layout.bounds[count:] = 0
        own[:, 1] += active[:count]


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_load_keeps_the_tensors_while_they_have_room(backend):
    """Addresses are those of before, so that graphs hold, until more work needs larger tables."""
    q, *memory = tensors(2, 2, 16)
    layout = GrowingLayout(PADDED, ROWS, torch.device(DEVICE))
    moved = []
    for count, rest in ((2, 10), (1, 10), (2, 3), (6, 40), (1, 1), (6, 40)):
        own, prompts = OWN[:count], PROMPTS[:count]
        layout.load(own, prompts, own[:, 1] + rest)
        out = rope_attention(q, q[:0], q[:0], layout, rope=ROPE, memory=memory, backend=backend)
        torch.testing.assert_close(out[:count], of_the_host(own, prompts, q, memory, count))
        assert not out[count:].any()
        moved.append(layout.moved)
    assert moved == ([0] * 6 if backend == "reference" else [0, 0, 0, 1, 1, 1])


def test_rows_that_nobody_sees_may_hold_anything():
    q, *memory = tensors(2, 2, 16)
    layout = GrowingLayout(PADDED, ROWS, torch.device(DEVICE))
    layout.load(OWN, PROMPTS, OWN[:, 1])
    expected = rope_attention(q, q[:0], q[:0], layout, rope=ROPE, memory=memory, backend="reference")
    for buffer in memory:
        buffer[600:] = torch.nan
    found = rope_attention(q, q[:0], q[:0], layout, rope=ROPE, memory=memory, backend="reference")
    assert torch.equal(found, expected)


def test_what_is_refused():
    q, *memory = tensors(2, 2, 16)
    layout = GrowingLayout(3, ROWS, torch.device(DEVICE))
    with pytest.raises(ValueError, match="expected at most 3 sequences within 700 rows, got 6"):
        layout.load(OWN, PROMPTS, OWN[:, 1])
    with pytest.raises(ValueError, match="expected at most 3 sequences within 700 rows"):
        layout.load(OWN[:2], PROMPTS[:2], np.array([211, ROWS + 1]))
    with pytest.raises(ValueError, match="backend: expected one that reads bounds on the device, got 'sdpa'"):
        rope_attention(q[:3], q[:0], q[:0], layout, rope=ROPE, memory=memory, backend="sdpa")
    with pytest.raises(ValueError, match=r"q: expected shape \[3, H, D\], got \[9, 2, 16\]"):
        rope_attention(q, q[:0], q[:0], layout, rope=ROPE, memory=memory)
    with pytest.raises(ValueError, match="k: expected"):
        rope_attention(q[:3], q[:1], q[:1], layout, rope=ROPE, memory=memory)
