"""Attention by its definition, the layouts that it is tested on, and inputs for them."""

import torch
from helpers.numerics import FLOOR, assert_close_to_fp64

from dph_kernels import PackedLayout, Rotary, rope_attention

ROPE = Rotary(base=10_000.0, reversed=True)
LENGTHS = (1, 2, 63, 64, 65, 111, 257)

# Every shape of the system; numbers of queries, keys and memory rows are the layout's.
LAYOUTS = {
    **{f"causal-{n}": PackedLayout.documents([n]) for n in LENGTHS},
    "batch": PackedLayout.dense(3, 17),
    "documents": PackedLayout.documents([5, 0, 64, 1, 33]),
    "branches": PackedLayout.shared_prefix([7, 0, 65, 3], [[3, 1], [4, 4], [63, 0, 2, 70], []]),
    "empty-memory": PackedLayout.with_memory([9, 4], [0, 0], 16),
    "part-memory": PackedLayout.with_memory([65, 1, 0, 7], [3, 40, 8, 0], 40),
    "full-memory": PackedLayout.with_memory([63, 5], [64, 64], 64),
    "turned-ring": PackedLayout.with_memory([17, 30], [32, 32], 32, [1000, 77]),
    "more-keys": PackedLayout.aligned([1, 20, 64], [65, 33, 64], [0, 5, 100]),
    "fewer-keys": PackedLayout.aligned([9, 4], [5, 4], [4, 0]),  # the first four rows see nothing
    "decode": PackedLayout.decode([64, 0, 5], [[1, 3, 9], [2], []], 9),
    "overlapping-prefixes": PackedLayout(
        torch.tensor([[0, 5, 20, 25, 0, 12, 12], [5, 9, 25, 29, 4, 15, 15], [9, 30, 29, 50, 0, 20, 20]]), 30, 50
    ),
    "shared-own-keys": PackedLayout(torch.tensor([[0, 3, 0, 9, 0, 0, 6], [3, 10, 0, 9, 0, 0, 2]]), 10, 9),
    "own-across-memory": PackedLayout(torch.tensor([[0, 10, 0, 80, 0, 0, 70]]), 10, 16, 64),
    "prefix-across-memory": PackedLayout(torch.tensor([[0, 10, 40, 50, 0, 40, 40]]), 10, 30, 20),
    "no-keys": PackedLayout(torch.tensor([[0, 4, 0, 0, 0, 0, 0]]), 4, 0),
    "padding": PackedLayout(torch.tensor([[2, 7, 1, 6, 0, 0, 3], [9, 12, 7, 10, 0, 0, 0]]), queries=14, keys=11),
}  # fmt: skip


def rotate(x, positions, rope):
    """Multiply pairs (x_i, x_{i + D/2}) as complex numbers by exp(i position base^(-2i/D))."""
    half = x.shape[-1] // 2
    frequencies = rope.base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.cpu().double()[:, None, None] * frequencies * (-1 if rope.reversed else 1)
    cos, sin = (t.to(x.device, x.dtype) for t in (angles.cos(), angles.sin()))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def dense(q, k, v, layout, memory=None, scale=None, rope=ROPE):
    """softmax(mask(rot(q) rot(k)^T scale)) v over all keys at once, in the dtype of ``q``; blind rows give zeros.

    Query heads are grouped by definition: each key head is repeated for the query heads of its group.
    """
    mask = layout.visible().to(q.device)
    q, k = rotate(q, layout.query_positions, rope), rotate(k, layout.key_positions, rope)
    if memory is not None:
        k, v = torch.cat([memory[0], k]), torch.cat([memory[1], v])
    if k.shape[1] < q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask, float("-inf"))
    p = scores.softmax(-1).masked_fill(~mask.any(-1)[:, None], 0)
    return torch.einsum("hqk,khd->qhd", p, v)


def inputs(layout, heads, head_dim, dtype, device="cpu"):
    """q, k, v, memory (or None) and an upstream gradient, rounded to ``dtype``.

    ``heads`` is the number of all heads, or the numbers of query heads and of key heads.
    """
    query_heads, key_heads = (heads, heads) if isinstance(heads, int) else heads
    sizes = (layout.queries, layout.keys, layout.keys, layout.memory, layout.memory, layout.queries)
    q, k, v, memory_k, memory_v, grad = (
        torch.randn(n, h, head_dim, dtype=torch.float64).to(device, dtype)
        for n, h in zip(sizes, (query_heads, *[key_heads] * 4, query_heads), strict=True)
    )
    return q, k, v, (memory_k, memory_v) if layout.memory else None, grad


def run(function, qkv, layout, memory, grad, dtype, **kwargs):
    """Output and gradients of q, k, v, all computed from the same rounded numbers in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
    memory = memory and tuple(m.to(dtype) for m in memory)
    out = function(*leaves, layout, memory=memory, **kwargs)
    out.backward(grad.to(dtype))
    return out, *(x.grad for x in leaves)


def compare(layout, given, device, backend, scale=None, floor=None):
    """Output and gradients of a backend against the definition in fp64, by the rule of numerics.py."""
    q, k, v, memory, grad = given
    dtype, rest = q.dtype, ((q, k, v), layout.to(device), memory, grad)
    got = run(rope_attention, *rest, dtype, scale=scale, rope=ROPE, backend=backend)
    same = run(dense, *rest, dtype, scale=scale)
    truth = run(dense, *rest, torch.float64, scale=scale)
    for name, *three in zip(("out", "dq", "dk", "dv"), got, same, truth, strict=True):
        assert three[0].dtype == dtype
        if three[2].any() or not three[2].numel():
            assert_close_to_fp64(*three, name, floor=floor)
        else:  # one visible key: dp - delta cancels, exactly only in exact arithmetic
            assert three[0].abs().max() <= 10 * FLOOR[dtype]
