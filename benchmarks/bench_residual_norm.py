"""The residual connection and its LayerNorm or RMSNorm, against eager PyTorch and torch.compile of it.

The CPU has a small and a large number of rows, a GPU the tokens of a step at the paper's width; the norm of each head
is that of queries in a joint projection, without a residual. On a GPU both passes are also timed as a CUDA graph,
without Python. The gradients are those of all inputs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import layer_norm, rms_norm

from dph_kernels import dispatch, residual_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}[DTYPE]  # of the largest value
CASES = {
    "cpu": [("layer", (256, 768)), ("layer", (4096, 768)), ("rms", (256, 768)), ("rms", (4096, 768)),
            ("rms", (512, 16, 128))],
    "cuda": [("layer", (16384, 1536)), ("rms", (16384, 1536)), ("rms", (16384, 16, 128))],
}[DEVICE]  # fmt: skip
EPS = 1e-5
SECONDS = 1.0  # approximate time per row
TITLES = {
    "forward": "forward", "both": "forward + backward", "graph": "forward + backward as a CUDA graph",
}  # fmt: skip
GOALS = {"eager": 1.0}


def eager(x, update, weight, bias, kind):
    """The computation of PyTorch's modules."""
    total = x if update is None else x + update
    if kind == "rms":
        return total, rms_norm(total, weight.shape, weight, EPS)
    return total, layer_norm(total, weight.shape, weight, bias, EPS)


def compiled():
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True)


def ours(backend):
    return functools.partial(residual_norm, eps=EPS, backend=backend)


class Contender(NamedTuple):
    """``make()`` gives a function of (x, update, weight, bias, kind)."""

    who: str
    make: Callable
    rival: bool = True


CONTENDERS = [
    *(Contender(b, functools.partial(ours, b), rival=False) for b in dispatch.AUTO["residual_norm"][DEVICE]),
    Contender("eager", lambda: eager),
    Contender("torch.compile", compiled),
]


@functools.lru_cache(maxsize=1)
def inputs(kind, size):
    """Return the arguments, None for those that a case has not, and the upstream gradients of the results."""
    torch.manual_seed(0)
    columns, heads = size[-1], len(size) == 3

    def random(*size):
        return torch.randn(size, device=DEVICE).to(DTYPE)

    given = {
        "x": random(size[0], 2 * size[1], columns)[:, : size[1]] if heads else random(*size),  # queries of a projection
        "update": None if heads else random(*size),
        "weight": random(columns),
        "bias": random(columns) if kind == "layer" else None,
    }
    for x in given.values():
        if x is not None:
            x.requires_grad_()
    return given | {"kind": kind}, [random(*size) for _ in range(1 if heads else 2)]


def step(run, direction, given, upstream):
    """Return the results that have an upstream gradient, and for both directions the gradients."""
    with torch.set_grad_enabled(direction != "forward"):
        results = run(**given)[-len(upstream) :]
    if direction == "forward":
        return [*results]
    leaves = [x for x in given.values() if isinstance(x, torch.Tensor)]
    return [*results, *torch.autograd.grad(results, leaves, upstream)]


def check(run, direction, given, upstream):
    """Compare with eager PyTorch in fp64."""
    wide = {name: leaf.detach().double().requires_grad_() if isinstance(leaf, torch.Tensor) else leaf
            for name, leaf in given.items()}  # fmt: skip
    truth = step(eager, direction, wide, [x.double() for x in upstream])
    for got, want in zip(step(run, direction, given, upstream), truth, strict=True):
        error = (got.double() - want).abs().max()
        assert error <= TOLERANCE * want.abs().max(), f"off by {error:.2e}"


def bytes_moved(direction, size):
    """Bytes of rows that are read or written."""
    with_update = len(size) == 2
    forward, backward = (4, 4) if with_update else (2, 3)
    rows = forward if direction == "forward" else forward + backward
    return DTYPE.itemsize * rows * torch.Size(size).numel()


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.who)
@pytest.mark.parametrize("direction", ["forward", "both", *(["graph"] if DEVICE == "cuda" else [])])
@pytest.mark.parametrize(("kind", "size"), CASES, ids=str)
def bench_residual_norm(kind, size, direction, contender, timed, peak_memory, record, limits):
    if not contender.rival and (reason := dispatch.missing("residual_norm", contender.who, DEVICE, DTYPE)):
        pytest.skip(reason)
    (given, upstream), run = inputs(kind, size), contender.make()
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
    letters = ("T", "H", "D") if len(size) == 3 else ("T", "C")
    labels = ", ".join([*(["rms"] if kind == "rms" else []), *map("{}={}".format, letters, size)])
    record(
        f"residual_norm, {labels}, {TITLES[direction]}",
        contender.who,
        bytes_moved=bytes_moved(direction, size),
        limit=limits.bandwidth(DEVICE),
        peak=peak,
        rival=contender.rival,
        kind="" if contender.rival else "ours",
        target=None if contender.rival else GOALS,
    )
