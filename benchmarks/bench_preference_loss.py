"""The joint preference objective with gradients and metrics: the kernel, eager PyTorch, torch.compile of the latter.

Each runs through its public function and autograd: at the paper's 64 pairs most of the time is Python's and PyTorch's
own. Bytes: six inputs are read and four gradients written, 40 per pair with one reward head in fp32.
"""

import functools

import pytest
import torch
from torch.nn.functional import logsigmoid

from dph_kernels import dispatch, preference_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = dispatch.choose("preference_loss", DEVICE).backend
BETA, DPO_EPSILON, DPH_EPSILON = 0.6, 0.25, 0.1  # as in preference_loss
CASES = [(64, 1), (64, 3), (4096, 1), (65_536, 1), (1_000_000, 1)]
SECONDS = 0.7  # approximate time per row
each = pytest.mark.parametrize(("pairs", "heads"), CASES)


def describe(chosen, rejected, dim=None):
    """Return accuracy, margin, mean of chosen and of rejected; per head with ``dim`` 0."""
    margin = chosen - rejected
    return [x.mean(dim) for x in ((margin > 0).to(margin.dtype), margin, chosen, rejected)]


def eager(r_w, r_l, p_w, p_l, f_w, f_l):
    """The objective as the paper and most training scripts write it, with every metric of `preference_loss`."""
    e = DPH_EPSILON
    terms = (1 - e) * logsigmoid(r_w) + e * logsigmoid(-r_w) + e * logsigmoid(r_l) + (1 - e) * logsigmoid(-r_l)
    dph = -terms.mean()
    e, d = DPO_EPSILON, BETA * ((p_w - p_l) - (f_w - f_l))
    dpo = -((1 - e) * logsigmoid(d) + e * logsigmoid(-d)).mean()
    loss = dpo + dph
    with torch.no_grad():
        implicit = BETA * (p_w - f_w), BETA * (p_l - f_l)
        found = [loss, dph, dpo, *describe(r_w, r_l), *describe(*implicit), loss.isfinite().to(loss.dtype)]
        metrics = torch.stack(found)
        if r_w.dim() == 2:
            heads = torch.stack([-terms.mean(0), *describe(r_w, r_l, 0)], 1)
            metrics = torch.cat([metrics, heads.flatten()])
    return loss, metrics


@functools.cache
def inputs(pairs, heads):
    torch.manual_seed(0)
    shape = (pairs,) if heads == 1 else (pairs, heads)
    rewards = [torch.randn(shape, device=DEVICE) for _ in range(2)]
    logprobs = [torch.randn(pairs, device=DEVICE) * 4 - 20 for _ in range(4)]
    return [x.requires_grad_(i < 4) for i, x in enumerate(rewards + logprobs)]  # the reference model is frozen


def step(run, given):
    """Return loss, metrics and the four gradients."""
    loss, metrics = run(*given)
    return loss, metrics, *torch.autograd.grad(loss, given[:4])


def check(results, given):
    """Compare results with fp64 before anything is timed."""
    truth = step(eager, [x.detach().double().requires_grad_(x.requires_grad) for x in given])
    for got, want in zip(results, truth, strict=False):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def bench(run, who, pairs, heads, timed, record, limits, **notes):
    given = inputs(pairs, heads)
    check(step(run, given), given)
    timed(lambda: step(run, given), SECONDS)
    note(record, who, pairs, heads, limits, 4 * heads + 6, **notes)


def note(record, who, pairs, heads, limits, values, title="", **notes):
    """Record a row of the table; each pair reads and writes ``values`` numbers."""
    name = f"preference_loss{title}, {pairs} pairs" + (f", {heads} heads" if heads > 1 else "")
    record(name, who, bytes_moved=4 * pairs * values, limit=limits.bandwidth(DEVICE), **notes)


@each
def bench_ours(pairs, heads, timed, record, limits):
    who = {"cpu": "C++", "triton": "Triton"}.get(OURS, OURS)
    bench(preference_loss, who, pairs, heads, timed, record, limits, target={"eager": 5, "reference": 5})


@each
def bench_reference(pairs, heads, timed, record, limits):
    """The same public function over plain PyTorch: checks, metrics and gradients without a kernel."""
    run = functools.partial(preference_loss, backend="reference")
    bench(run, "reference", pairs, heads, timed, record, limits, rival=True)


@each
def bench_eager(pairs, heads, timed, record, limits):
    bench(eager, "eager", pairs, heads, timed, record, limits, rival=True)


@each
def bench_compiled(pairs, heads, timed, record, limits):
    torch._dynamo.reset()
    run = torch.compile(eager, fullgraph=True)
    try:
        step(run, inputs(pairs, heads))
    except Exception as error:  # any failure of the compiler on this machine
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    bench(run, "torch.compile", pairs, heads, timed, record, limits, rival=True)


@each
@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a CUDA device, and PyTorch sees none")
def bench_on_the_device(pairs, heads, timed, record, limits):
    """Loss, slopes and metrics replayed as a CUDA graph, without Python. The goal is 10 microseconds."""
    given = [x.detach() for x in inputs(pairs, heads)]
    preference_loss(*given)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = preference_loss(*given)
    graph.replay()
    check(results, inputs(pairs, heads))
    timed(graph.replay, SECONDS)
    note(record, "Triton", pairs, heads, limits, 4 * heads + 6, title=" forward, CUDA graph")
