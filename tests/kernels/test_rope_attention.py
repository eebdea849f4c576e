"""Rotary attention against a dense implementation of its definition, forward and backward, on every backend."""

import pytest
import torch
from helpers.attention import LAYOUTS, ROPE, compare, dense, inputs, rotate, run
from helpers.numerics import FLOOR, assert_close_to_fp64, implementations, skip_where_unsupported, strange_nans

from dph_kernels import PackedLayout, dispatch, native, rope_attention

BACKENDS = implementations("rope_attention")


# Numbers


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("name", ["branches", "turned-ring"])
def test_the_way_through_the_dispatcher_gives_the_same_bits(name, device, backend, monkeypatch):
    layout = LAYOUTS[name]
    q, k, v, memory, grad = inputs(layout, (4, 2), 16, torch.float32, device)
    found = []
    for observed in (False, True):
        if observed:
            monkeypatch.setattr(dispatch, "can_bypass_dispatcher", lambda tensors: False)
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        out, keys = rope_attention(
            *given, layout.to(device), rope=ROPE, memory=memory, return_keys=True, backend=backend
        )  # fmt: skip
        assert not keys.requires_grad
        assert (type(out.grad_fn).__name__ == "dph::rope_attentionBackward") != observed
        found.append([out, keys, *torch.autograd.grad(out, given, grad)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("kind", ["negated", "batched"])
def test_upstream_gradients_that_pytorch_has_put_off(kind, device, backend):
    layout = LAYOUTS["branches"]
    q, k, v, memory, grad = inputs(layout, (4, 2), 16, torch.float32, device)
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    out = rope_attention(*given, layout.to(device), rope=ROPE, memory=memory, backend=backend)
    expected = torch.autograd.grad(out, given, -grad, retain_graph=True)
    if kind == "negated":
        got = torch.autograd.grad(out, given, torch._neg_view(grad))
    else:
        both = torch.autograd.grad(out, given, torch.stack([grad, -grad]), is_grads_batched=True)
        got = [x[1] for x in both]
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_agrees_with_the_definition(name, device, backend):
    layout = LAYOUTS[name]
    compare(layout, inputs(layout, 2, 16, torch.float32, device), device, backend)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("heads", [(4, 2), (6, 1)])
@pytest.mark.parametrize(
    "name", ["causal-65", "documents", "branches", "part-memory", "turned-ring", "fewer-keys", "decode", "padding"]
)
def test_query_heads_that_share_a_key_head(name, heads, device, backend):
    layout = LAYOUTS[name]
    compare(layout, inputs(layout, heads, 16, torch.float32, device), device, backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("heads", [(17, 1), (70, 1), (24, 3)])
@pytest.mark.parametrize("candidates", [1, 2, 20])
def test_more_heads_in_a_group_than_a_tile_has_rows(candidates, heads, device, backend):
    """And tiles of few queries, of one segment or of several."""
    layout = PackedLayout.decode([70], [[1 + i % 5 for i in range(candidates)]], 5)
    compare(layout, inputs(layout, heads, 16, torch.float32, device), device, backend)
    layout = PackedLayout.documents([3])
    compare(layout, inputs(layout, heads, 16, torch.float32, device), device, backend)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize(("head_dim", "heads"), [(16, (6, 1)), (64, (4, 2)), (100, 3), (128, (3, 3))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["branches", "turned-ring"])
def test_every_dtype_and_head_dimension(name, dtype, head_dim, heads, device, backend):
    skip_where_unsupported("rope_attention", device, backend, dtype)
    layout = LAYOUTS[name]
    compare(layout, inputs(layout, heads, head_dim, dtype, device), device, backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_ten_thousand(dtype, device, backend):
    """exp(1e4) overflows every dtype: only the subtraction of the maximum saves it."""
    skip_where_unsupported("rope_attention", device, backend, dtype)
    layout = LAYOUTS["branches"]
    given = q, k, *_ = inputs(layout, 2, 64, dtype, device)
    q, k = (rotate(x.cpu().double(), layout.query_positions, ROPE) for x in (q, k))
    scale = 1e4 / torch.einsum("qhd,khd->qkh", q, k).abs().max().item()
    if dtype == torch.float32:
        rounding = 1e4 * torch.finfo(dtype).eps  # of the log-sum-exp from which the backward pass rebuilds p
        return compare(layout, given, device, backend, scale, floor=rounding)
    # Which score is the largest is a matter of how q and k were rounded: the mean of ones is 1, whoever has it.
    q, k, v, memory, grad = given
    assert memory is None
    out, *grads = run(rope_attention, (q, k, torch.ones_like(v)), layout.to(device), memory, grad, dtype, scale=scale,
                      rope=ROPE, backend=backend)  # fmt: skip
    torch.testing.assert_close(out, torch.ones_like(out), rtol=FLOOR[dtype], atol=0)
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_far_positions_change_nothing_but_rounding(device, backend):
    """Attention depends on distances only: rolling on to position 10**7 leaves the result."""
    near = PackedLayout.aligned([33], [33])
    far = PackedLayout.aligned([33], [33], [10**7])
    q, k, v, _, grad = inputs(near, 2, 64, torch.float32, device)
    here = run(rope_attention, (q, k, v), near.to(device), None, grad, torch.float32, rope=ROPE, backend=backend)
    there = run(rope_attention, (q, k, v), far.to(device), None, grad, torch.float32, rope=ROPE, backend=backend)
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("name", ["part-memory", "padding", "fewer-keys", "decode"])
def test_rows_that_see_nothing_are_zero_with_zero_gradient(name, device, backend):
    layout = LAYOUTS[name].to(device)
    q, k, v, memory, grad = inputs(layout, 2, 16, torch.float32, device)
    unseen = ~layout.visible().to(device)
    blind, idle = unseen.all(1), unseen[:, layout.memory :].all(0)
    outside = blind.clone()
    for q0, q1, *_ in layout.segments.tolist():
        outside[q0:q1] = False
    q[outside], k[idle], v[idle] = float("nan"), float("nan"), float("nan")  # nobody may read them
    if memory:
        nobody = unseen[:, : layout.memory].all(0)
        memory[0][nobody], memory[1][nobody] = float("nan"), float("nan")
    out, dq, dk, dv = run(rope_attention, (q, k, v), layout, memory, grad, torch.float32, rope=ROPE, backend=backend)
    assert bool(blind.any()) or name in ("part-memory", "decode")
    for result, rows in ((out, blind), (dq, blind), (dk, idle), (dv, idle)):
        assert (result[rows] == 0).all()
        assert result[~rows].isfinite().all()


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_layouts(dtype, device, backend):
    skip_where_unsupported("rope_attention", device, backend, dtype)
    for layout in (PackedLayout.documents([]), PackedLayout.documents([0, 0]), PackedLayout.aligned([0], [4]),
                   PackedLayout.with_memory([0], [3], 5)):  # fmt: skip
        q, k, v, memory, grad = inputs(layout, (4, 2), 16, dtype, device)
        out, dq, dk, dv = run(
            rope_attention, (q, k, v), layout.to(device), memory, grad, dtype, rope=ROPE, backend=backend
        )
        assert out.shape == dq.shape == q.shape
        assert dk.shape == dv.shape == v.shape
        assert not dk.any()
        assert not dv.any()


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_results_are_the_same_in_every_run(device, backend):
    layout = LAYOUTS["branches"]
    q, k, v, memory, grad = inputs(layout, (4, 2), 64, torch.float32, device)
    runs = [
        run(rope_attention, (q, k, v), layout.to(device), memory, grad, torch.float32, rope=ROPE, backend=backend)
        for _ in range(3)
    ]
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("lanes", [4, 8])
@pytest.mark.parametrize("name", ["documents", "branches", "turned-ring", "decode"])
@pytest.mark.parametrize("head_dim", [24, 36, 64])
def test_narrower_vectors(name, head_dim, lanes):
    """What a processor without AVX-512, or without AVX2, runs."""
    skip_where_unsupported("rope_attention", "cpu", "cpu", torch.float32)
    if native.module().attention_lanes(lanes) != lanes:
        pytest.skip(f"this processor has no vectors of {lanes} floats")
    try:
        compare(LAYOUTS[name], inputs(LAYOUTS[name], (6, 2), head_dim, torch.float32), "cpu", "cpu")
    finally:
        native.module().attention_lanes(16)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_a_prompt_of_more_than_two_to_the_fifteen_keys(device, backend):
    layout = PackedLayout.decode([33_000], [[3, 1]], 4)
    # Values of both signs: the mean of so many is a hundredth of what is rounded.
    compare(layout, inputs(layout, 1, 16, torch.float32, device), device, backend, floor=1e-5)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("queries", [2, 16])
def test_errors_do_not_grow_with_the_keys(queries, device, backend):
    """The mean of 16,000 values of one sign: sums are made by block first, else they are several times as far off."""
    layout = PackedLayout.aligned([queries], [16_000])
    q, k, v, *_ = inputs(layout, 1, 16, torch.float32, device)
    given = q, k, v.abs()
    got = rope_attention(*given, layout.to(device), rope=ROPE, backend=backend)
    truth = dense(*(x.double() for x in given), layout.to(device))
    if backend not in ("cpu", "triton"):  # sums of others, whose order depends on the processor
        return assert_close_to_fp64(got, dense(*given, layout.to(device)), truth)
    assert (got - truth).abs().max() <= 2e-6 * truth.abs().max()


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("heads", [3, (6, 2)])
def test_nothing_is_lost_between_many_threads(heads, device, backend):
    """Tiles and heads on several threads give what one thread gives, bit for bit."""
    layout = PackedLayout.shared_prefix([70, 5], [[40, 80], [9, 9, 9]])
    given = inputs(layout, heads, 32, torch.float32, device)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            rest = (given[:3], layout.to(device), None, given[4])
            results.append(run(rope_attention, *rest, torch.float32, rope=ROPE, backend=backend))
        finally:
            torch.set_num_threads(1)
    if backend == "cpu":
        assert all(map(torch.equal, *results))
    else:
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("heads", [0, 2])
def test_any_scale_and_no_heads(heads, scale, device, backend):
    compare(LAYOUTS["branches"], inputs(LAYOUTS["branches"], heads, 10, torch.float32, device), device, backend, scale)


@pytest.mark.parametrize(("device", "backend"), [b for b in BACKENDS if "sdpa" not in b.values])
@pytest.mark.parametrize("lengths", [[40], [1, 2, 1]])
@pytest.mark.parametrize("nan", strange_nans())
def test_nan_is_not_taken_for_seeing_nothing(nan, lengths, device, backend):
    """A query that is NaN gives NaN, not the zeros of a row without keys; PyTorch's own kernels may drop it."""
    layout = PackedLayout.documents(lengths).to(device)
    q, k, v, _, _ = inputs(layout, 2, 16, torch.float32, device)
    q[2] = nan
    out = rope_attention(q, k, v, layout, rope=ROPE, backend=backend)
    assert out[2].isnan().all()
    assert out[[i for i in range(len(q)) if i != 2]].isfinite().all()


# Strides


def strided(x):
    """The same numbers, last dimension not contiguous."""
    return torch.stack([x, torch.full_like(x, 7.0)], -1)[..., 0]


def transposed(x):
    """The same numbers, heads first in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("view", [strided, transposed])
@pytest.mark.parametrize("name", ["branches", "part-memory"])
def test_inputs_of_any_stride(name, view, device, backend):
    layout = LAYOUTS[name].to(device)
    q, k, v, memory, grad = inputs(layout, (4, 2), 16, torch.float32, device)
    expected = run(rope_attention, (q, k, v), layout, memory, grad, torch.float32, rope=ROPE, backend=backend)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = rope_attention(
        *(view(x) for x in leaves), layout, memory=memory and tuple(view(m) for m in memory), rope=ROPE,
        backend=backend,
    )  # fmt: skip
    assert not view(grad).is_contiguous()
    out.backward(view(grad))
    for got, want in zip((out, *(x.grad for x in leaves)), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_views_of_one_projection(device, backend):
    """q, k and v as the model gives them: three views of [T, 3, H, D]."""
    layout = LAYOUTS["branches"].to(device)
    rows = torch.randn(layout.queries, 3, 2, 16, device=device).requires_grad_()
    rope_attention(*rows.unbind(1), layout, rope=ROPE, backend=backend).square().sum().backward()
    got, rows.grad = rows.grad, None
    dense(*rows.unbind(1), layout).square().sum().backward()
    torch.testing.assert_close(got, rows.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_expanded_inputs_and_upstream_gradients(device, backend):
    """One key head for all (multi-query) by expansion, and the zero-stride gradient that ``sum`` gives."""
    layout = LAYOUTS["documents"].to(device)
    q, k, v, _, _ = inputs(layout, 4, 16, torch.float32, device)
    results = []
    for function in (lambda *a: rope_attention(*a, rope=ROPE, backend=backend), dense):
        leaves = [q.clone().requires_grad_(), *(x[:, :1].clone().requires_grad_() for x in (k, v))]
        function(leaves[0], leaves[1].expand(-1, 4, -1), leaves[2].expand(-1, 4, -1), layout).sum().backward()
        results.append([x.grad for x in leaves])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_only_the_gradients_that_are_wanted(device, backend):
    layout = LAYOUTS["branches"].to(device)
    q, k, v, _, grad = inputs(layout, 2, 16, torch.float32, device)
    expected = run(rope_attention, (q, k, v), layout, None, grad, torch.float32, rope=ROPE, backend=backend)
    v.requires_grad_()
    rope_attention(q, k, v, layout, rope=ROPE, backend=backend).backward(grad)
    torch.testing.assert_close(v.grad, expected[3])
    assert q.grad is None
    assert k.grad is None


# Memory


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_memory_gets_no_gradient(device, backend):
    layout = LAYOUTS["part-memory"].to(device)
    q, k, v, memory, _ = inputs(layout, 2, 16, torch.float32, device)
    for x in (q, k, v, *memory):
        x.requires_grad_()
    rope_attention(q, k, v, layout, rope=ROPE, memory=memory, backend=backend).sum().backward()
    assert [m.grad for m in memory] == [None, None]
    assert q.grad is not None


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_returned_keys_serve_as_memory(device, backend):
    """A sequence in two pieces, the second one looking at the first one's returned keys, equals it in one."""
    whole = PackedLayout.documents([40]).to(device)
    q, k, v, _, _ = inputs(whole, (4, 2), 16, torch.float32, device)
    expected = rope_attention(q, k, v, whole, rope=ROPE, backend=backend)
    first, second = PackedLayout.documents([25]).to(device), PackedLayout.with_memory([15], [25], 25).to(device)
    head, keys = rope_attention(
        q[:25], k[:25].requires_grad_(), v[:25], first, rope=ROPE, return_keys=True, backend=backend
    )
    assert head.requires_grad
    assert not keys.requires_grad
    tail = rope_attention(q[25:], k[25:], v[25:], second, rope=ROPE, memory=(keys, v[:25]), backend=backend)
    torch.testing.assert_close(torch.cat([head, tail]), expected)
    torch.testing.assert_close(keys, rotate(k[:25].detach(), first.query_positions, ROPE))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_the_order_of_memory_does_not_matter(device, backend):
    layout = LAYOUTS["full-memory"].to(device)
    q, k, v, memory, _ = inputs(layout, 2, 16, torch.float32, device)
    turned = tuple(m.view(2, 64, 2, 16).roll(17, dims=1).flatten(0, 1) for m in memory)
    results = [rope_attention(q, k, v, layout, rope=ROPE, memory=m, backend=backend) for m in (memory, turned)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_memory_written_before_backward_is_noticed(device, backend):
    layout = LAYOUTS["full-memory"].to(device)
    q, k, v, memory, grad = inputs(layout, 2, 16, torch.float32, device)
    out = rope_attention(q.requires_grad_(), k, v, layout, rope=ROPE, memory=memory, backend=backend)
    memory[0][3] = 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(grad)


# PyTorch's machinery


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("name", ["branches", "part-memory", "fewer-keys"])
def test_gradcheck(name, device, backend):
    skip_where_unsupported("rope_attention", device, backend, torch.float64)
    layout = {
        "branches": PackedLayout.shared_prefix([3, 0], [[2, 1], [2]]),
        "part-memory": PackedLayout.with_memory([3, 1], [2, 4], 4),
        "fewer-keys": PackedLayout.aligned([4], [2], [2]),
    }[name].to(device)
    q, k, v, memory, _ = inputs(layout, (4, 2), 4, torch.float64, device)

    def attend(q, k, v):
        return rope_attention(q, k, v, layout, rope=ROPE, memory=memory, backend=backend)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (q, k, v)], atol=1e-8)


def operands(layout, dtype, device, backend):
    q, k, v, memory, grad = inputs(layout, (4, 2), 16, dtype, device)
    memory = memory or (k[:0].clone(), v[:0].clone())
    tables = layout.tables(ROPE, 16, torch.float64 if dtype == torch.float64 else torch.float32)
    return (q, k, v, *memory, layout.segments, *tables, 0.25, backend), grad


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("name", ["branches", "memory", "padding", "empty"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype, device, backend):
    skip_where_unsupported("rope_attention", device, backend, dtype)
    layout = {
        "branches": PackedLayout.shared_prefix([5, 0], [[3, 1], [4]]),
        "memory": PackedLayout.with_memory([5, 1], [3, 8], 8),
        "padding": LAYOUTS["padding"],
        "empty": PackedLayout.documents([]),
    }[name].to(device)
    args, grad = operands(layout, dtype, device, backend)
    for x in args[:3]:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.dph.rope_attention.default, args)
    q, _, v, memory_k, memory_v, *rest = args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    out, lse, rotated = torch.ops.dph.rope_attention(*args)
    backward = (grad, q, rotated, v, memory_k, memory_v, out, lse, *rest)
    torch.library.opcheck(torch.ops.dph.rope_attention_backward.default, backward)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("name", ["branches", "part-memory"])
def test_compiles_to_one_graph(name, device, backend):
    layout = LAYOUTS[name].to(device)
    q, k, v, memory, grad = inputs(layout, (4, 2), 16, torch.float32, device)

    def attend(q, k, v):
        out, keys = rope_attention(q * 2, k, v, layout, rope=ROPE, memory=memory, return_keys=True, backend=backend)
        return out + 1, keys

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, keys = function(*leaves)
        out.backward(grad)
        results.append((out, keys, *(x.grad for x in leaves)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_compiled_without_gradient(device, backend):
    layout = LAYOUTS["decode"].to(device)
    q, k, v, memory, _ = inputs(layout, 2, 16, torch.float32, device)

    def attend(q):
        return rope_attention(q, k, v, layout, rope=ROPE, memory=memory, backend=backend)

    with torch.no_grad():
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(q), attend(q))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_a_layout_serves_inference_mode_and_then_training(device, backend):
    layout = PackedLayout.shared_prefix([3], [[2, 2]]).to(device)
    q, k, v, _, grad = inputs(layout, 2, 16, torch.float32, device)
    with torch.inference_mode():
        judged = rope_attention(q, k, v, layout, rope=ROPE, backend=backend)
    out = rope_attention(q.requires_grad_(), k, v, layout, rope=ROPE, backend=backend)
    out.backward(grad)
    assert torch.equal(out, judged)
    assert q.grad.isfinite().all()


# Errors


def call(**changes):
    layout = PackedLayout.with_memory([4], [2], 3)
    given = {name: torch.zeros(n, 2, 8) for name, n in (("q", 4), ("k", 4), ("v", 4))}
    given |= {"layout": layout, "rope": ROPE, "memory": (torch.zeros(3, 2, 8), torch.zeros(3, 2, 8))}
    return rope_attention(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(5, 2, 8)}, r"q: expected shape \[4, H, D\], got \[5, 2, 8\]"),
        ({"q": torch.zeros(4, 16)}, r"q: expected shape \[4, H, D\], got \[4, 16\]"),
        ({"q": torch.zeros(4, 2, 7)}, "q: expected an even head dimension, got 7"),
        ({"q": torch.zeros(4, 2, 8, dtype=torch.int64)}, "q: expected float16 or bfloat16 or float32 or float64, got"),
        ({"q": None}, "q: expected a tensor, got NoneType"),
        ({"k": torch.zeros(3, 2, 8)}, r"k: expected shape \[4, K, 8\], got \[3, 2, 8\]"),
        ({"q": torch.zeros(4, 12, 8), "k": torch.zeros(4, 5, 8)},
         "k: expected a number of heads that divides q's H = 12, got 5"),
        ({"k": torch.zeros(4, 4, 8)}, "k: expected a number of heads that divides q's H = 2, got 4"),
        ({"k": torch.zeros(4, 0, 8)}, "k: expected a number of heads that divides q's H = 2, got 0"),
        ({"q": torch.zeros(4, 0, 8)}, r"k: expected shape \[4, 0, 8\], got \[4, 2, 8\]"),
        ({"k": torch.zeros(4, 1, 8)}, r"v: expected shape \[4, 1, 8\], got \[4, 2, 8\]"),
        ({"k": torch.zeros(4, 1, 8), "v": torch.zeros(4, 1, 8)},
         r"memory\[0\]: expected shape \[3, 1, 8\], got \[3, 2, 8\]"),
        ({"k": torch.zeros(4, 2, 8).half()}, "k: expected float32, got float16"),
        ({"v": torch.zeros(4, 2, 16)}, r"v: expected shape \[4, 2, 8\], got \[4, 2, 16\]"),
        ({"v": torch.zeros(4, 2, 8, device="meta")}, "v: expected a tensor on cpu, got one on meta"),
        ({"memory": None}, r"memory\[0\]: expected shape \[3, 2, 8\], got \[0, 2, 8\]"),
        ({"memory": (torch.zeros(3, 2, 8), torch.zeros(2, 2, 8))}, r"memory\[1\]: expected shape \[3, 2, 8\]"),
        ({"memory": (torch.zeros(3, 2, 8).double(), torch.zeros(3, 2, 8))}, "expected float32, got float64"),
        ({"layout": PackedLayout.documents([4])}, r"memory\[0\]: expected shape \[0, 2, 8\], got \[3, 2, 8\]"),
        ({"layout": PackedLayout.with_memory([4], [2], 3).to("meta")}, "layout: expected a tensor on cpu"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)
    assert call().shape == (4, 2, 8)


@pytest.mark.parametrize("backend", ["flash", "cuda"])
def test_a_backend_asked_for_by_name_never_falls_through(backend):
    with pytest.raises(RuntimeError, match=f"rope_attention: backend '{backend}' cannot run: "):
        call(backend=backend)
