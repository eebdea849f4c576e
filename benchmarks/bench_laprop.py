"""LaProp with prior decay, alone and after the gradient norm for clipping, against rivals.

On the CPU 20 million parameters in one tensor, on a GPU those of the paper's model in its 228 tensors. Bytes are the
necessary ones: parameter and both moments read and written, gradient and prior read, 32 per parameter in fp32; the norm
reads the gradient once more. AdamW has no prior (28 bytes): a rival for bandwidth only.
"""

import functools

import pytest
import torch

import dph
from dph_kernels import dispatch, gradient_norm, laprop
from dph_kernels.laprop import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = {"cpu": "C++", "cuda": "CUDA C++"}[DEVICE]
SECONDS = 1.0  # approximate time per row
ROUND = 0.1 if DEVICE == "cuda" else 2e-3  # seconds of queued steps, so that the GPU never waits for Python
LIMIT = 1.0  # of the norm
STEP = {
    "lr": 3e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "prior_decay": 0.5,
    "bias_correction": 0.9,
    "momentum_scale": 1.1,
}
NAMES = ("params", "grads", "exp_avg", "exp_avg_sq", "priors", "copies")
# dtypes of gradients and priors, whether bf16 copies are written, bytes per parameter
KINDS = {
    "fp32": (torch.float32, torch.float32, False, 32),
    "bf16 prior": (torch.float32, torch.bfloat16, False, 30),
    "bf16 gradients and copies": (torch.bfloat16, torch.float32, True, 32),
    "bf16 prior, gradients and copies": (torch.bfloat16, torch.bfloat16, True, 30),
}
GOALS = {"cpu": {"eager": 8, "torch.compile": 0.95}, "cuda": {}}[DEVICE]
missing = dispatch.missing("laprop", DEVICE, DEVICE)
built = pytest.mark.skipif(bool(missing), reason=str(missing))
kinds = pytest.mark.parametrize("kind", KINDS)
gradients = pytest.mark.parametrize("kind", ["fp32", "bf16 gradients and copies"])  # gradients in fp32 and bf16


@functools.cache
def shapes():
    """Return the timed shapes: one tensor on the CPU, a model's on a GPU."""
    if DEVICE == "cpu":
        return [(20_000_000,)]
    with torch.device("meta"):
        return [p.shape for p in dph.Model(dph.ModelConfig()).parameters()]


def size():
    return sum(torch.Size(s).numel() for s in shapes())


def make(kind, sizes):
    """Return the tensor lists of a step, by name."""
    torch.manual_seed(0)
    grad, prior, copies, _ = KINDS[kind]
    draw = lambda dtype=torch.float32, scale=1.0: [  # noqa: E731
        (torch.randn(s, device=DEVICE) * scale).to(dtype) for s in sizes
    ]
    lists = {"params": draw(), "grads": draw(grad), "exp_avg": draw(scale=1e-4)}
    lists |= {"exp_avg_sq": [x.square_() for x in draw()], "priors": draw(prior)}
    return lists | {"copies": [x.bfloat16() for x in lists["params"]] if copies else []}


@functools.lru_cache(maxsize=1)
def timed_lists(kind):
    return make(kind, shapes())


def ours(lists, norm):
    scale = gradient_norm(lists["grads"], max_norm=LIMIT, backend=DEVICE).scale if norm else None
    laprop(**{**lists, "copies": lists["copies"] or None}, **STEP, grad_scale=scale, backend=DEVICE)


def coefficient(grads):
    """Return the clip coefficient as PyTorch computes it, but with a norm that is not rounded to bf16."""
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=dtype) for g in grads]))
    return (LIMIT / (total + 1e-6)).clamp(max=1.0)


def eager(lists, norm):
    scale = coefficient(lists["grads"]) if norm else None
    reference.forward(*(lists[name] for name in NAMES), scale, None, None, **STEP)


def unchecked(lists, norm):
    """``eager`` without reading the coefficient on the host, which would synchronise a compiled graph."""
    grads = lists["grads"]
    if norm:
        scale = coefficient(grads)
        grads = [g * scale for g in grads]
    rest = [lists[name] for name in NAMES if name not in ("params", "grads")]
    reference.forward(lists["params"], grads, *rest, None, None, None, **STEP)


def compiled(kind, norm):
    torch.compiler.reset()  # otherwise it refuses the ninth graph of one function
    step = torch.compile(unchecked, fullgraph=True, dynamic=False)  # checked on other sizes than it is timed on
    try:
        check(step, kind, norm)
    except AssertionError:
        raise
    except Exception as error:  # any failure of the compiler on this machine
        pytest.skip(f"torch.compile does not work here: {str(error).strip().splitlines()[0]}")
    return step


def check(step, kind, norm):
    """Compare a step's results with fp64 before anything is timed."""
    lists = make(kind, [(100_003,), (7, 5)])
    truth = {name: [x.double() for x in tensors] for name, tensors in lists.items()}
    step(lists, norm)
    eager(truth | {"copies": []}, norm)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        for got, want in zip(lists[name], truth[name], strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-7)
    for copy, param in zip(lists["copies"], lists["params"], strict=bool(lists["copies"])):
        assert torch.equal(copy, param.bfloat16())


def title(kind, norm):
    return f"{'norm + step' if norm else 'step'}, {size() / 1e6:.0f}M, {kind}"


def measure(timed, record, limits, step, kind, norm, who, **notes):
    check(step, kind, norm)
    lists = timed_lists(kind)
    timed(lambda: step(lists, norm), SECONDS, ROUND)
    moved = (KINDS[kind][3] + norm * KINDS[kind][0].itemsize) * size()
    record(title(kind, norm), who, bytes_moved=moved, limit=limits.bandwidth(DEVICE), **notes)


@built
@kinds
@pytest.mark.parametrize("norm", [False, True])
def bench_ours(timed, record, limits, kind, norm):
    measure(timed, record, limits, ours, kind, norm, OURS, target=GOALS)


@kinds
@pytest.mark.parametrize("norm", [False, True])
def bench_eager(timed, record, limits, kind, norm):
    measure(timed, record, limits, eager, kind, norm, "eager", rival=True)


@kinds
@pytest.mark.parametrize("norm", [False, True])
def bench_compiled(timed, record, limits, kind, norm):
    measure(timed, record, limits, compiled(kind, norm), kind, norm, "torch.compile", rival=True)


@pytest.mark.parametrize("norm", [False, True])
def bench_adamw(timed, record, limits, norm):
    """PyTorch's fused kernel; clipping is a separate pass over the gradients."""
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in shapes()]
    for p in params:
        p.grad = torch.randn_like(p)
    optimiser = torch.optim.AdamW(params, lr=STEP["lr"], fused=True)

    def step():
        if norm:
            torch.nn.utils.clip_grad_norm_(params, LIMIT)
        optimiser.step()

    timed(step, SECONDS, ROUND)
    moved = (28 + 4 * norm) * size()
    bandwidth = limits.bandwidth(DEVICE)
    record(title("fp32", norm), "AdamW(fused=True)", bytes_moved=moved, limit=bandwidth, rival=True)


@built
@gradients
def bench_norm(timed, record, limits, kind):
    grads = timed_lists(kind)["grads"]
    want = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]))
    torch.testing.assert_close(gradient_norm(grads, backend=DEVICE).norm, want, rtol=1e-12, atol=0)
    timed(lambda: gradient_norm(grads, max_norm=LIMIT, backend=DEVICE), SECONDS, ROUND)
    record(norm_title(kind), OURS, bytes_moved=grads[0].itemsize * size(), limit=limits.bandwidth(DEVICE))


@gradients
def bench_norm_of_pytorch(timed, record, limits, kind):
    grads = timed_lists(kind)["grads"]
    want = gradient_norm(grads, backend="reference").norm
    torch.testing.assert_close(torch.nn.utils.get_total_norm(grads).double(), want, rtol=1e-2, atol=0)  # bf16 for bf16
    timed(lambda: torch.nn.utils.get_total_norm(grads), SECONDS, ROUND)
    moved = grads[0].itemsize * size()
    record(norm_title(kind), "get_total_norm", bytes_moved=moved, limit=limits.bandwidth(DEVICE), rival=True)


def norm_title(kind):
    return f"norm, {size() / 1e6:.0f}M, {KINDS[kind][0]}".replace("torch.", "")
