"""Rotary attention over packed layouts, against all rivals that are available.

All times include the rotation (compiled, for rivals) and the joining of memory and new keys. Every contender is first
compared with the reference in fp64 on some heads. Rates count necessary arithmetic and bytes only, the same for all: no
token twice, no padding, no gradient of the detached memory.
"""

import functools
import itertools
from typing import NamedTuple

import pytest
import torch

from benchmarks.attention import Workload, workloads
from benchmarks.attention_rivals import ROPE, Contender, Inputs, Plan, contenders
from dph_kernels import PackedLayout, rope_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}[DTYPE]  # of the largest value
CHECKED = 2  # key heads that are compared, with the query heads of their groups
SECONDS = 0.7  # approximate time per row
TITLES = {"forward": "forward", "both": "forward + backward"}


class Problem(NamedTuple):
    """A workload's tensors (q, k, v, memory, upstream gradient), and its result in fp64 on some groups of heads."""

    layout: PackedLayout
    tensors: list[tuple]
    truth: list[torch.Tensor]


@functools.lru_cache(maxsize=1)
def problem(work: Workload) -> Problem:
    """Return tensors, output and gradients of q, k and v."""
    torch.manual_seed(0)
    layout = work.layout.to(DEVICE)
    sizes = (layout.queries, layout.keys, layout.keys, layout.memory, layout.memory, layout.queries)
    tensors = []
    for _ in range(work.copies(DTYPE.itemsize)):
        heads = (work.heads, *[work.key_heads] * 4, work.heads)
        q, k, v, *memory, grad = (
            torch.randn(n, h, work.head_dim, device=DEVICE, dtype=DTYPE) for n, h in zip(sizes, heads, strict=True)
        )
        tensors.append((q, k, v, tuple(memory), grad))
    q, k, v, memory, grad = tensors[0]
    queries = CHECKED * work.group
    leaves = [x[:, :n].double().requires_grad_() for x, n in ((q, queries), (k, CHECKED), (v, CHECKED))]
    memory = tuple(x[:, :CHECKED].double() for x in memory)
    out = rope_attention(*leaves, layout, rope=ROPE, memory=memory, backend="reference")
    grads = torch.autograd.grad(out, leaves, grad[:, :queries].double())
    return Problem(layout, tensors, [out.detach(), *grads])


def step(run, direction, given: Inputs):
    """Run one call; return the output, and for both directions the gradients."""
    if direction == "forward":
        with torch.no_grad():
            return [run(given)]
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    out = run(given._replace(q=leaves[0], k=leaves[1], v=leaves[2]))
    return [out, *torch.autograd.grad(out, leaves, given.grad)]


def check(results, plan: Plan, truth):
    """Compare the output of every copy of a row, and the sum of the gradients of its copies."""
    places = plan.rows, plan.rows, plan.new, plan.new
    for i, (got, rows, want) in enumerate(zip(results, places, truth, strict=False)):
        rows, got = rows[rows >= 0], got[rows >= 0, : want.shape[1]].double()
        if i:
            got, rows = torch.zeros_like(want).index_add_(0, rows, got), slice(None)
        error = (got - want[rows]).abs().max() if len(got) else 0.0
        assert error <= TOLERANCE * want.abs().max(), f"{('out', 'dq', 'dk', 'dv')[i]}: off by {error:.2e}"


def reason(error):
    """Return the informative line of an error; the compiler's is not the first."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return next((line.strip() for line in lines if "context: raised" in line), lines[0])


CASES = [
    pytest.param(
        work,
        direction,
        contender,
        id=f"{work.name}-{direction}-{contender.who}",
        marks=[pytest.mark.brief] if work.brief and contender.brief else [],
    )
    for work in workloads(DEVICE == "cuda")
    for direction in work.directions
    for contender in contenders(work, DEVICE, DTYPE)
]


@pytest.mark.parametrize(("work", "direction", "contender"), CASES)
def bench_attention(work: Workload, direction: str, contender: Contender, timed, peak_memory, record, limits):
    layout, tensors, truth = problem(work)
    plan = Plan.from_batches(contender.batches, layout, work.head_dim)
    given = [plan.lay_out(*each) for each in tensors]
    rival = contender.kind != "ours"
    try:
        run = contender.make(plan)
        results = step(run, direction, given[0])
    except Exception as error:
        if not rival:
            raise
        torch.cuda.empty_cache()  # it may have run out of memory
        pytest.skip(f"{contender.who}: {reason(error)}")
    check(results, plan, truth)
    del results
    turns = itertools.cycle(given)
    peak = peak_memory(lambda: step(run, direction, given[0]))
    timed(lambda: step(run, direction, next(turns)), SECONDS)
    record(
        f"{work.name}, {TITLES[direction]}",
        contender.who,
        flops=work.flops(direction),
        bytes_moved=work.bytes_moved(direction, DTYPE.itemsize),
        limit=limits.matmul(DEVICE, DTYPE),
        bandwidth=limits.bandwidth(DEVICE),
        peak=peak,
        rival=rival,
        kind=contender.kind,
        target=None if rival else work.goals.get(direction),
    )
