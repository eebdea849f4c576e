"""The residual connection and its LayerNorm, against eager PyTorch and torch.compile of it.

The CPU has a small and a large number of rows, a GPU the tokens of a step at the paper's width. On a GPU both passes
are also timed as a CUDA graph, without Python. The gradients are those of all four inputs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import layer_norm

from dph_kernels import dispatch, residual_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}[DTYPE]  # of the largest value
SIZES = {"cpu": [(256, 768), (4096, 768)], "cuda": [(16384, 1536)]}[DEVICE]
SECONDS = 1.0  # approximate time per row
TITLES = {
    "forward": "forward", "both": "forward + backward", "graph": "forward + backward as a CUDA graph",
}  # fmt: skip
GOALS = {"eager": 1.0}


def eager(x, update, weight, bias):
    """The computation of PyTorch's modules."""
    total = x + update
    return total, layer_norm(total, weight.shape, weight, bias)


def compiled():
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True)


def ours(backend):
    return functools.partial(residual_norm, backend=backend)


class Contender(NamedTuple):
    """``make()`` gives a function of (x, update, weight, bias)."""

    who: str
    make: Callable
    rival: bool = True


CONTENDERS = [
    *(Contender(b, functools.partial(ours, b), rival=False) for b in dispatch.AUTO["residual_norm"][DEVICE]),
    Contender("eager", lambda: eager),
    Contender("torch.compile", compiled),
]


@functools.lru_cache(maxsize=1)
def inputs(rows, columns):
    """Return (x, update, weight, bias), and the upstream gradients of both results."""
    torch.manual_seed(0)
    sizes = (rows, columns), (rows, columns), (columns,), (columns,)
    given = [torch.randn(size, device=DEVICE).to(DTYPE).requires_grad_() for size in sizes]
    return given, [torch.randn(rows, columns, device=DEVICE).to(DTYPE) for _ in range(2)]


def step(run, direction, given, upstream):
    """Return both results, and for both directions the gradients."""
    with torch.set_grad_enabled(direction != "forward"):
        results = run(*given)
    return [*results, *(torch.autograd.grad(results, given, upstream) if direction != "forward" else ())]


def check(run, direction, given, upstream):
    """Compare with eager PyTorch in fp64."""
    wide = [x.detach().double().requires_grad_() for x in given]
    truth = step(eager, direction, wide, [x.double() for x in upstream])
    for got, want in zip(step(run, direction, given, upstream), truth, strict=True):
        error = (got.double() - want).abs().max()
        assert error <= TOLERANCE * want.abs().max(), f"off by {error:.2e}"


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.who)
@pytest.mark.parametrize("direction", ["forward", "both", *(["graph"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def bench_residual_norm(rows, columns, direction, contender, timed, peak_memory, record, limits):
    if not contender.rival and (reason := dispatch.missing("residual_norm", contender.who, DEVICE, DTYPE)):
        pytest.skip(reason)
    (given, upstream), run = inputs(rows, columns), contender.make()
    try:
        step(run, direction, given, upstream)
    except Exception as error:
        if not contender.rival:
            raise
        pytest.skip(f"{contender.who}: {(str(error).strip().splitlines() or [repr(error)])[0]}")
    check(run, direction, given, upstream)
    call = functools.partial(step, run, direction, given, upstream)
    peak = peak_memory(call)
    if direction == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()
        graph.replay()
        for got, want in zip(kept, call(), strict=True):
            torch.testing.assert_close(got, want)
        call = graph.replay
    timed(call, SECONDS)
    record(
        f"residual_norm, T={rows}, C={columns}, {TITLES[direction]}",
        contender.who,
        bytes_moved=DTYPE.itemsize * (4 if direction == "forward" else 8) * rows * columns,
        limit=limits.bandwidth(DEVICE),
        peak=peak,
        rival=contender.rival,
        kind="" if contender.rival else "ours",
        target=None if contender.rival else GOALS,
    )
