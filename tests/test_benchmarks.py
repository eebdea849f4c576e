"""What the benchmarks count and compare: necessary work, plans that give the layout's result, the table."""

import re
from types import SimpleNamespace

import pytest
import torch
from attention import dense

from benchmarks import attention, attention_rivals, conftest
from benchmarks.attention_rivals import Plan

SMALL = [
    attention.documents("equal", [7, 7], 2),
    attention.documents("unequal", [5, 9, 1], 2),
    attention.memory("memory", 2, 5, 3, 2),
    attention.branches("branches", [4, 6], [[3, 1], [2, 5]], 2, pad=12),
    attention.decode("decode", 6, [2, 1, 4], 2, fresh=0),
]


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.name)
def test_necessary_work_is_counted_from_who_sees_whom(work):
    seen = work.layout.visible()
    products = 2 * seen.sum() + 5 * seen.sum() - 2 * seen[:, : work.layout.memory].sum()
    assert work.flops("forward") == 2 * 64 * 2 * 2 * seen.sum()
    assert work.flops("both") == 2 * 64 * 2 * products
    queries, keys, used = work.layout.queries, work.layout.keys, seen.any(0).sum()
    assert work.bytes_moved("forward", 2) == 2 * 64 * 2 * (2 * queries + 2 * used)
    assert work.bytes_moved("both", 2) == 2 * 64 * 2 * (6 * queries + 4 * used + 2 * keys)


@pytest.mark.parametrize("make", [attention_rivals.eager, attention_rivals.sdpa])
@pytest.mark.parametrize(("work", "name"), [(work, name) for work in SMALL for name in work.plans])
def test_every_plan_computes_its_layout(work, name, make, monkeypatch):
    monkeypatch.setattr(attention_rivals, "compiled_rotation", lambda device: attention_rivals.rotate)
    layout = work.layout
    sizes = (layout.queries, layout.keys, layout.keys, layout.memory, layout.memory)
    q, k, v, *memory = (torch.randn(n, 2, 64) for n in sizes)
    plan = Plan.of(work.plans[name], layout)
    got = make(plan)(plan.lay_out(q, k, v, tuple(memory), torch.zeros_like(q)))
    expected = dense(q, k, v, layout, memory=memory, rope=attention_rivals.ROPE)
    real = plan.rows >= 0
    torch.testing.assert_close(got[real], expected[plan.rows[real]], rtol=1e-5, atol=1e-5)


def test_copies_of_a_query_share_its_gradient():
    work = SMALL[3]
    plan = Plan.of(work.plans["padded"], work.layout)
    grad = torch.randn(work.layout.queries, 2, 64)
    laid = plan.lay_out(grad, grad, grad, (grad[:0], grad[:0]), grad).grad
    real = plan.rows >= 0
    total = torch.zeros_like(grad).index_add_(0, plan.rows[real], laid[real])
    torch.testing.assert_close(total, grad)
    assert not laid[~real].any()


def test_the_table_ranks_and_compares():
    def bench(who, seconds, **info):
        given = {"operator": "attention", "who": who, "rival": True, "kind": None, "target": None, "peak": None}
        given |= {"flops": 3e9, "limit": 2e11, "bytes_moved": None, "bandwidth": None, "quantiles": (seconds, seconds)}
        return SimpleNamespace(extra_info=given | info, stats=SimpleNamespace(median=seconds))

    benches = [
        bench("slow", 0.09, kind="padded"),
        bench("fast", 0.03),
        bench("mine", 0.02, rival=False, target={"padded": 4}),
    ]
    header, _, *rows = (re.split(r"\s{2,}", line) for line in conftest.summary(benches).splitlines())
    assert header == ["operator", "by", "ms", "20% - 80%", "rate", "of the limit", "speed of ours"]
    assert [row[1] for row in rows] == ["mine", "fast", "slow"]
    assert rows[0][-3:] == ["150 GFLOP/s", "75% of 200", "1.50× best rival, 4.50× padded (goal 4×)"]
    assert [row[-1] for row in rows[1:]] == ["1.50×", "4.50×"]


def test_quantiles_of_times():
    assert conftest._quantiles([1, 2, 3, 4, 5, 6]) == (2, 5)
    assert conftest._quantiles([7]) == (7, 7)
