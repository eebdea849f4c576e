"""Pooler and reward heads at the paper's size (C = 1536, F = 4096), against eager PyTorch and torch.compile of it.

Forward as in evaluation, and forward and backward with dropout as in training; the gradients are those of all weights
and of the hidden rows. With few rows the cost is that of reading the weights: 38 MB in bf16. On a GPU calls cycle
through several sets of weights, more than its cache holds, and the forward pass is also timed as a CUDA graph.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear, silu

from dph_kernels import dispatch, swiglu_reward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}[DTYPE]  # of the largest value
C, F = 1536, 4096
DROPOUT = 0.1
SECONDS = 1.0  # approximate time per row
SETS = 8 if DEVICE == "cuda" else 1  # of inputs
NAMES = ("hidden", "reward", "w1", "b1", "w2", "b2")
TITLES = {
    "forward": "forward", "both": "forward + backward, dropout", "graph": f"forward, {SETS} calls as a CUDA graph",
}  # fmt: skip
# Evaluation: from one answer to the choices of 64 questions. 128 rows are the paper's 64 pairs.
CASES = [("swiglu", rows, 1, "forward") for rows in (1, 16, 128, 256)]
CASES += [("swiglu", 128, 8, "forward"), ("bert", 128, 1, "forward")]
CASES += [("swiglu", rows, 1, "both") for rows in (16, 128)]
CASES += [("swiglu", rows, 1, "graph") for rows in (1, 16, 128)] if DEVICE == "cuda" else []
GOALS = {"cpu": {"eager": 1.0}, "cuda": {"best rival": 1.0}}[DEVICE]


def eager(hidden, reward, w1, b1, w2, b2, dropout):
    """The computation of PyTorch's modules."""
    if w1 is not None:
        x, g = linear(hidden, w1, b1).chunk(2, -1)
        hidden = x * silu(g)
    return linear(drop(linear(hidden, w2, b2).tanh(), dropout), reward).float()


def compiled():
    torch._dynamo.reset()
    return torch.compile(eager, fullgraph=True)


def ours(backend):
    def run(hidden, reward, w1, b1, w2, b2, dropout):
        return swiglu_reward(hidden, reward, w1=w1, b1=b1, w2=w2, b2=b2, dropout=dropout, seed=7, backend=backend)

    return run


class Contender(NamedTuple):
    """``make()`` gives a function of the tensors in NAMES and the dropout probability."""

    who: str
    make: Callable
    rival: bool = True


CONTENDERS = [
    *(Contender(b, functools.partial(ours, b), rival=False) for b in dispatch.AUTO["swiglu_reward"][DEVICE]),
    Contender("eager", lambda: eager),
    Contender("torch.compile", compiled),
]


@functools.lru_cache(maxsize=1)
def inputs(pooler, rows, heads):
    """Return ``SETS`` lists of the tensors of NAMES; None for those that the pooler lacks."""
    sizes = {"hidden": (rows, C), "reward": (heads, C), "w2": (C, C), "b2": (C,)}
    if pooler == "swiglu":
        sizes |= {"w1": (2 * F, C), "b1": (2 * F,), "w2": (C, F)}
    torch.manual_seed(0)
    return [[_draw(name, sizes.get(name)) for name in NAMES] for _ in range(SETS)]


def _draw(name, size):
    if size is None:
        return None
    scale = 1.0 if name == "hidden" else size[-1] ** -0.5  # hidden states have a LayerNorm's scale
    return (torch.randn(size, device=DEVICE) * scale).to(DTYPE).requires_grad_()


def step(run, direction, given, dropout):
    """Return the rewards, and for both directions the gradients."""
    with torch.set_grad_enabled(direction == "both"):
        rewards = run(*given, dropout)
    if direction != "both":
        return [rewards]
    return [rewards, *torch.autograd.grad(rewards.sum(), [x for x in given if x is not None])]


def check(run, direction, given, rival):
    """Compare with fp64; with dropout only ours, against the same masks in fp64."""
    wide = [None if x is None else x.detach().double().requires_grad_() for x in given]
    for dropout in [0.0] if rival else [0.0, DROPOUT]:
        truth = step(ours("reference"), direction, wide, dropout)
        for got, want in zip(step(run, direction, given, dropout), truth, strict=True):
            error = (got.double() - want).abs().max()
            assert error <= TOLERANCE * want.abs().max(), f"off by {error:.2e}"


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.who)
@pytest.mark.parametrize(("pooler", "rows", "heads", "direction"), CASES)
def bench_swiglu_reward(pooler, rows, heads, direction, contender, timed, peak_memory, record, limits):
    if not contender.rival and (reason := dispatch.missing("swiglu_reward", contender.who, DEVICE, DTYPE)):
        pytest.skip(reason)
    sets, run = inputs(pooler, rows, heads), contender.make()
    try:
        step(run, direction, sets[0], DROPOUT)
    except Exception as error:
        if not contender.rival:
            raise
        pytest.skip(f"{contender.who}: {(str(error).strip().splitlines() or [repr(error)])[0]}")
    check(run, direction, sets[0], contender.rival)
    dropout, passes = (DROPOUT, 3) if direction == "both" else (0.0, 1)
    turns = itertools.cycle(sets)
    peak = peak_memory(lambda: step(run, direction, sets[0], dropout))
    if direction == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [step(run, direction, given, dropout) for given in sets]
        graph.replay()
        for (got,), given in zip(kept, sets, strict=True):
            torch.testing.assert_close(got, step(run, direction, given, dropout)[0])
        timed(graph.replay, SECONDS)
        passes = len(kept)
    else:
        timed(lambda: step(run, direction, next(turns), dropout), SECONDS)
    weights = sum(x.numel() for x in sets[0][1:] if x is not None)
    record(
        f"swiglu_reward, {pooler}, R={rows}" + (f", {heads} heads" if heads > 1 else "") + f", {TITLES[direction]}",
        contender.who,
        flops=passes * 2 * rows * weights,
        bytes_moved=passes * (DTYPE.itemsize * (weights + rows * C) + 4 * rows * heads),
        limit=limits.matmul(DEVICE, DTYPE),
        bandwidth=limits.bandwidth(DEVICE),
        peak=peak,
        rival=contender.rival,
        kind="" if contender.rival else "ours",
        target=None if contender.rival else GOALS,
    )
