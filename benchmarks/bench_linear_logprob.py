"""Log-probabilities under a head of 50,272 tokens, against all rivals that are available.

All compute the loss of supervised training, the mean of -log p over R rows, so that implementations with one loss for
all rows can take part: they have the upstream gradient in the forward pass and need three products instead of four (as
does ours on a GPU and on most CPUs). The "weighted" rows have the mean of -w log p, with a weight w of each row that
ours is given. Rates count the necessary three products. Peak memory excludes the gradients themselves.
"""

import ctypes
import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dph_kernels import dispatch, linear_logprob

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
R, C, V = (16384 if DEVICE == "cuda" else 4096), 768, 50272
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}[DTYPE]  # of the largest value
CHUNK = 2**24  # logits at a time in the plain loop
SECONDS = 2.0
# Forward and backward pass, by device: our speed as a multiple of theirs, and their memory as a multiple of ours.
GOALS = {"cpu": {"materialised": 1.1}, "cuda": {"best rival": 1.0}}
MEMORY = {"cpu": {"materialised": 20}, "cuda": {}}
PRODUCTS = {"forward": 1, "both": 3, "weighted": 3}
TITLES = {"forward": "forward", "both": "forward + backward", "weighted": "weighted, forward + backward"}
BY_ROW = tuple(PRODUCTS)  # directions of implementations that return the log-probability of each row


class Contender(NamedTuple):
    """``make()`` gives a function of hidden, weight and targets: [R] log-probabilities, or the loss.

    Ours also takes the weights of the rows.
    """

    who: str
    make: Callable
    kind: str = "rival"
    directions: tuple[str, ...] = BY_ROW


def materialised(hidden, weight, targets):
    return torch.log_softmax(hidden @ weight.T, -1, dtype=torch.float32).gather(-1, targets[:, None]).squeeze(-1)


def compiled():
    return torch.compile(materialised, fullgraph=True, dynamic=False)  # checked on other sizes than it is timed on


def loop(hidden, weight, targets):
    """Chunks of rows, each chunk's logits recomputed in the backward pass."""
    step = CHUNK // V
    parts = zip(hidden.split(step), targets.split(step), strict=True)
    return torch.cat([checkpoint(materialised, h, weight, t, use_reentrant=False) for h, t in parts])


def torch_chunked(reduction):
    """PyTorch's own fused loss (2.13 and later), with its default chunks."""

    def make():
        run, options = torch.nn.functional.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
        sign = -1 if reduction == "none" else 1
        return lambda hidden, weight, targets: sign * run(hidden, weight, targets, reduction=reduction, options=options)

    return make


def liger():
    """Triton; one loss for all rows."""
    run = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return lambda hidden, weight, targets: run(hidden, weight, targets, reduction="mean")


def cut_cross_entropy():
    """Triton, fully fused (arXiv 2411.09009), without skipping small gradients.

    Its gradients are nevertheless off by 4 % of the largest, since it sums them in bf16: too much for our check.
    """
    run = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, targets: -run(hidden, weight, targets, reduction="none", filter_eps=None)


def ours(backend):
    return lambda: functools.partial(linear_logprob, backend=backend)


CONTENDERS = [
    *(Contender(backend, ours(backend), "ours") for backend in dispatch.AUTO["linear_logprob"][DEVICE]),
    Contender("materialised", lambda: materialised),
    Contender("torch.compile", compiled),
    Contender("plain loop", lambda: loop),
    Contender("torch, by row", torch_chunked("none")),
    Contender("torch, one loss", torch_chunked("mean"), directions=("both",)),
    *([Contender("Liger", liger, directions=("both",))] if DEVICE == "cuda" else []),
    *([Contender("cut-cross-entropy", cut_cross_entropy)] if DEVICE == "cuda" else []),
]


@functools.cache
def problem(rows):
    """Return hidden, weight, targets and the weights of rows."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, C, device=DEVICE).to(DTYPE).requires_grad_()
    weight = torch.randn(V, C, device=DEVICE).mul(0.05).to(DTYPE).requires_grad_()
    return hidden, weight, torch.randint(V, (rows,), device=DEVICE), torch.rand(rows, device=DEVICE)


def step(contender, direction, run, hidden, weight, targets, row_weights):
    """Return the loss, and unless ``direction`` is forward its gradients."""
    known = {"row_weights": row_weights} if direction == "weighted" and contender.kind == "ours" else {}
    with torch.set_grad_enabled(direction != "forward"):
        out = run(hidden, weight, targets, **known)
        if direction == "weighted":
            out = row_weights * out
        loss = -out.mean() if out.ndim else out
    return [loss] if direction == "forward" else [loss, *torch.autograd.grad(loss, (hidden, weight))]


@functools.cache
def truth(rows, weighted):
    hidden, weight, targets, row_weights = problem(rows)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    losses = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, targets, reduction="none")
    loss = (row_weights * losses if weighted else losses).mean()
    return [loss.detach(), *torch.autograd.grad(loss, wide)]


def check(contender, direction, run, rows=300):
    """Compare with fp64, on fewer rows since fp64 is slow."""
    got = step(contender, direction, run, *problem(rows))
    for result, want in zip(got, truth(rows, direction == "weighted"), strict=False):
        error = (result.double() - want).abs().max()
        assert error <= TOLERANCE * want.abs().max(), f"off by {error:.2e}"


def peak_on_cpu(run):
    """Return the bytes by which a call raises peak resident memory; None if the system does not report it."""

    def peak():
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

    try:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise freed memory of earlier calls would be reused and not counted
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # resets the peak to the current use
    except (OSError, AttributeError):
        return None
    before = peak()
    run()
    return peak() - before


CASES = [
    pytest.param(direction, contender, id=f"{direction}-{contender.who.replace(', ', '-').replace(' ', '-')}")
    for direction in PRODUCTS
    for contender in CONTENDERS
    if direction in contender.directions
]


@pytest.mark.parametrize(("direction", "contender"), CASES)
def bench_linear_logprob(direction, contender, timed, peak_memory, record, limits):
    rival = contender.kind != "ours"
    if not rival and (reason := dispatch.missing("linear_logprob", contender.who, DEVICE, DTYPE)):
        pytest.skip(reason)
    try:
        run = contender.make()
        check(contender, direction, run)
    except Exception as error:  # a rival that fails or is inaccurate on this machine
        if not rival:
            raise
        pytest.skip(f"{contender.who}: {(str(error).strip().splitlines() or [repr(error)])[0]}")
    given = problem(R)

    def once():
        step(contender, direction, run, *given)

    once()
    peak = peak_memory(once) if DEVICE == "cuda" else peak_on_cpu(once)
    if peak is not None and direction != "forward":
        peak -= sum(x.numel() * x.element_size() for x in given[:2])
    timed(once, SECONDS)
    record(
        f"linear_logprob R={R} V={V}, {TITLES[direction]}",
        contender.who,
        flops=PRODUCTS[direction] * 2 * R * C * V,
        limit=limits.matmul(DEVICE, DTYPE),
        peak=peak,
        rival=rival,
        kind=contender.kind,
        target=None if rival or direction == "forward" else GOALS[DEVICE],
        memory_target=None if rival or direction == "forward" else MEMORY[DEVICE],
    )
