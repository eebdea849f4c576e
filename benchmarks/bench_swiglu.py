"""The gated activation with the bias of the preceding product, against eager PyTorch and torch.compile of it.

All take the product without its bias, [T, 2F]. Eager adds the bias in a separate pass; a model's product includes it,
but the bias's gradient, sums over all rows, remains. torch.compile fuses most of it. Bytes are those of inputs, results
and gradients, each once. On a GPU the matrices are far larger than the cache. On the CPU none reaches the 32 MB above
which malloc maps new memory for each call, whose page faults would cost more than the arithmetic.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import silu

from dph_kernels import dispatch, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}[DTYPE]  # of the largest value
SIZES = [(16384, 4096)] if DEVICE == "cuda" else [(256, 1024), (1536, 2048)]  # T, F
TITLES = {"forward": "forward", "both": "forward + backward"}
MATRICES = {"forward": 3, "both": 8}  # [T, F] that have to move: 2 + 1, and 2 + 1 + 2 more in the backward pass
SECONDS = 1.0  # approximate time per row
GOALS = {"cpu": {"eager": 1.0}, "cuda": {"best rival": 1.0}}[DEVICE]


def eager(projected, bias):
    x, gate = (projected + bias).chunk(2, -1)
    return x * silu(gate)


def compiled():
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True)


class Contender(NamedTuple):
    """``make()`` gives a function of projected and bias."""

    who: str
    make: Callable
    rival: bool = True


CONTENDERS = [
    *(
        Contender(backend, functools.partial(functools.partial, swiglu, backend=backend), rival=False)
        for backend in dispatch.AUTO["swiglu"][DEVICE]
    ),
    Contender("eager", lambda: eager),
    Contender("torch.compile", compiled),
]


@functools.lru_cache(maxsize=1)
def problem(rows, width):
    """Return projected, bias and the upstream gradient."""
    torch.manual_seed(0)
    projected, bias, grad = (
        torch.randn(size, device=DEVICE).to(DTYPE) for size in ((rows, 2 * width), 2 * width, (rows, width))
    )
    return projected.requires_grad_(), bias.requires_grad_(), grad


def step(run, direction, projected, bias, grad):
    """Return the result, and for both directions the gradients."""
    with torch.set_grad_enabled(direction == "both"):
        out = run(projected, bias)
    return [out, *torch.autograd.grad(out, (projected, bias), grad)] if direction == "both" else [out]


def check(run, direction, given):
    """Compare with fp64."""
    truth = step(eager, direction, *(x.detach().double().requires_grad_() for x in given))
    for got, want in zip(step(run, direction, *given), truth, strict=True):
        error = (got.double() - want).abs().max()
        assert error <= TOLERANCE * want.abs().max(), f"off by {error:.2e}"


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.who)
@pytest.mark.parametrize("direction", TITLES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def bench_swiglu(rows, width, direction, contender, timed, peak_memory, record, limits):
    if not contender.rival and (reason := dispatch.missing("swiglu", contender.who, DEVICE, DTYPE)):
        pytest.skip(reason)
    given, run = problem(rows, width), contender.make()
    try:
        step(run, direction, *given)
    except Exception as error:
        if not contender.rival:
            raise
        pytest.skip(f"{contender.who}: {(str(error).strip().splitlines() or [repr(error)])[0]}")
    check(run, direction, given)
    peak = peak_memory(lambda: step(run, direction, *given))
    timed(lambda: step(run, direction, *given), SECONDS)
    record(
        f"swiglu T={rows} F={width}, {TITLES[direction]}",
        contender.who,
        bytes_moved=MATRICES[direction] * rows * width * DTYPE.itemsize,
        limit=limits.bandwidth(DEVICE),
        peak=peak,
        rival=contender.rival,
        kind="" if contender.rival else "ours",
        target=None if contender.rival else GOALS,
    )
