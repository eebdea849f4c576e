"""The `sdpa` and `flash` backends: what they express and how, and why not the rest.

Their numbers are tested with those of all backends. flash-attn needs a GPU; here a function with its documented
meaning stands in for it.
"""

import sys
import types

import pytest
import torch
from helpers.attention import LAYOUTS, ROPE, compare, inputs, run
from helpers.numerics import FLOOR
from torch.utils.flop_counter import FlopCounterMode

from dph_kernels import PackedLayout, dispatch, rope_attention
from dph_kernels.rope_attention import contiguous, sdpa


def table(*rows, queries, keys, memory=0):
    return PackedLayout(torch.tensor(rows), queries=queries, keys=keys, memory=memory)


EXPRESSIBLE = {
    "one-branch": PackedLayout.shared_prefix([7, 5], [[3], []]),  # the branch sees the prompt's keys and its own: n < m
    "one-candidate": PackedLayout.decode([64], [[3]], 9),  # all of it in the memory
    "prompt-alone": table((0, 1, 0, 0, 2, 9, 7), queries=1, keys=9),  # one query of a prefix, no own key
    "memory-and-new": table((0, 4, 1, 6, 0, 1, 2), (4, 7, 8, 11, 8, 8, 0), queries=7, keys=4, memory=8),
    "shared-keys": table((0, 2, 0, 6, 0, 0, 4), (2, 4, 0, 6, 0, 0, 4), queries=4, keys=6),
    "unequal-distances": PackedLayout.documents([9, 4, 9, 9, 4, 4]),
    "any-order": table((5, 9, 0, 4, 0, 0, 0), (0, 5, 4, 9, 0, 0, 0), queries=9, keys=9),
}  # fmt: skip
END_TO_END = ("batch", "documents", "more-keys", "fewer-keys", "empty-memory", "causal-65")


def attempt(layout, backend, dtype=torch.float32):
    q, k, v, memory, _ = inputs(layout, 2, 16, dtype)
    return rope_attention(q, k, v, layout, memory=memory, rope=ROPE, backend=backend)


# Both


def test_sdpa_expresses_what_has_contiguous_keys_and_nothing_else():
    refused = set()
    for name, layout in LAYOUTS.items():
        try:
            attempt(layout, "sdpa")
        except contiguous.InexpressibleError:
            refused.add(name)
    across = {"own-across-memory", "prefix-across-memory"}
    assert (
        refused == {"branches", "part-memory", "full-memory", "turned-ring", "decode", "overlapping-prefixes"} | across
    )


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (LAYOUTS["branches"], "segment 2: its prefix ends at key 7, and its own keys begin at 10"),
        (LAYOUTS["full-memory"], "segment 0: its keys are on both sides of row 128, the end of the memory"),
        (table((0, 4, 0, 9, 0, 0, 5), queries=4, keys=1, memory=8), "segment 0: its keys are on both sides of row 8"),
        (table((0, 5, 3, 6, 0, 3, 3), queries=5, keys=6), "segment 0: with 5 queries and 3 own keys, alignment"),
        (
            table((0, 0, 5, 6, 0, 2, 0), (1, 3, 0, 2, 4, 6, 6), queries=3, keys=0, memory=6),
            "segment 1: its prefix ends at key 6",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["sdpa", "flash"])
def test_other_layouts_are_refused_with_the_segment_and_the_reason(layout, reason, backend, request):
    if backend == "flash":
        request.getfixturevalue("flash_attn")
    dtype = torch.float32 if backend == "sdpa" else torch.bfloat16
    with pytest.raises(RuntimeError, match=f"^rope_attention: backend '{backend}' cannot express {reason}"):
        attempt(layout, backend, dtype)


# scaled_dot_product_attention


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_sdpa_agrees_with_the_definition(name, dtype):
    layout = EXPRESSIBLE[name]
    compare(layout, inputs(layout, (6, 2), 16, dtype), "cpu", "sdpa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_with_scores_of_ten_thousand(dtype):
    layout = LAYOUTS["documents"]
    rounding = 4e4 * torch.finfo(torch.float32).eps  # of the log-sum-exp from which PyTorch's backward rebuilds p
    compare(layout, inputs(layout, 2, 64, dtype), "cpu", "sdpa", scale=1e4 / 64, floor=max(rounding, FLOOR[dtype]))


@pytest.mark.parametrize(
    ("layout", "calls"),
    [
        (PackedLayout.dense(3, 17), [(3, 17, 17, True)]),
        (PackedLayout.documents([5, 9, 5]), [(2, 5, 5, True), (1, 9, 9, True)]),
        (PackedLayout.aligned([4, 4], [9, 9]), [(2, 4, 9, True)]),
        (EXPRESSIBLE["unequal-distances"], [(3, 9, 9, False), (3, 4, 4, False)]),
        (EXPRESSIBLE["shared-keys"], [(2, 2, 6, False)]),
    ],
)
def test_sdpa_computes_equal_segments_together(layout, calls, monkeypatch):
    """One call a shape: batch, queries, keys, and whether the values were looked at where they lie."""
    seen = []

    def spy(q, k, v, **options):
        view = v.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
        seen.append((len(q), q.shape[2], k.shape[2], view))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    monkeypatch.setattr(sdpa, "scaled_dot_product_attention", spy)
    q, k, values, _, _ = inputs(layout, 2, 16, torch.float32)
    rope_attention(q, k, values, layout, rope=ROPE, backend="sdpa")
    assert seen == calls


def test_sdpa_is_recomputed_under_a_dispatch_mode():
    """The backward pass records inside a custom operator, also where PyTorch's FLOP counter looks on."""
    layout = LAYOUTS["documents"]
    q, k, v, _, grad = inputs(layout, 2, 16, torch.float32)
    options = {"rope": ROPE, "backend": "sdpa"}
    expected = run(rope_attention, (q, k, v), layout, None, grad, torch.float32, **options)
    with FlopCounterMode(display=False):
        got = run(rope_attention, (q, k, v), layout, None, grad, torch.float32, **options)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# flash-attn


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *,
           softmax_scale, causal, deterministic):  # fmt: skip
    """flash_attn_varlen_func as its documentation has it: causal is aligned at the end, rows that see nothing are 0.

    With fewer heads of k and v, which divide those of q, query heads 0, 1, 2 of 6 use head 0 of 2.
    """
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert causal
    assert deterministic
    for ends, longest, x in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
        assert ends.dtype == torch.int32
        assert (ends[0], ends[-1], ends.diff().max()) == (0, len(x), longest)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    parts = []
    for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[a:b].float(), k[c:d].float()) * softmax_scale
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
        p = scores.masked_fill(~mask, -1e30).softmax(-1) * mask
        parts.append(torch.einsum("hqk,khd->qhd", p, v[c:d].float()))
    return torch.cat(parts).to(q.dtype)


@pytest.fixture
def flash_attn(monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = varlen
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    missing = dispatch.missing
    monkeypatch.setattr(dispatch, "missing", lambda *given: None if given[1] == "flash" else missing(*given))
    for cached in (dispatch.choose, dispatch.implementation):
        cached.cache_clear()
    yield
    for cached in (dispatch.choose, dispatch.implementation):
        cached.cache_clear()


@pytest.mark.usefixtures("flash_attn", "poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [
    *(pytest.param(LAYOUTS[name], id=name) for name in END_TO_END),
    *(pytest.param(EXPRESSIBLE[name], id=name) for name in ("one-candidate", "prompt-alone", "unequal-distances")),
    pytest.param(table((2, 7, 1, 6, 0, 0, 3), (7, 9, 6, 8, 0, 0, 0), queries=14, keys=11), id="padding-outside"),
    pytest.param(PackedLayout.documents([0, 0]), id="empty"),
])  # fmt: skip
def test_flash_agrees_with_the_definition(layout, dtype):
    for heads in (3, (6, 2)):
        compare(layout, inputs(layout, heads, 16, dtype), "cpu", "flash")


@pytest.mark.usefixtures("flash_attn")
@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (LAYOUTS["padding"], "segment 1: its queries begin at 9, and those of the segment before end at 7"),
        (EXPRESSIBLE["one-branch"], "segment 1: its keys begin at 0, and those of the segment before end at 7"),
        (EXPRESSIBLE["any-order"], "segment 0: its keys begin at 0, and those of the segment before end at 9"),
        (table((0, 4, 0, 8, 0, 0, 4), (4, 7, 8, 11, 8, 8, 0), queries=7, keys=4, memory=8),
         "segment 1: it sees new keys, and the segments before see the memory"),
    ],
)  # fmt: skip
def test_flash_refuses_segments_that_do_not_lie_end_to_end(layout, reason):
    with pytest.raises(RuntimeError, match=f"^rope_attention: backend 'flash' cannot express {reason}$"):
        attempt(layout, "flash", torch.bfloat16)
