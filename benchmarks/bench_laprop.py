"""LaProp with prior decay on 20 million parameters: the C++ kernel, eager PyTorch, and torch.compile of the latter.

Bytes: parameter, both moments, gradient and prior are read, the first three written: 32 per parameter in fp32.
"""

import pytest
import torch

from dph_kernels import dispatch, laprop
from dph_kernels.laprop import reference

PARAMETERS = 20_000_000
BYTES = 32 * PARAMETERS
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
TIMING = {"rounds": 40, "warmup_rounds": 5, "iterations": 1}


def make(size, dtype=torch.float32):
    """params, grads, exp_avg, exp_avg_sq, priors: one tensor each."""
    torch.manual_seed(0)
    values = [torch.randn(size) for _ in range(5)]
    values[2] *= 1e-4
    values[3] = values[3].square()
    return [[x.to(dtype)] for x in values]


def eager(params, grads, exp_avg, exp_avg_sq, priors):
    reference.forward(params, grads, exp_avg, exp_avg_sq, priors, [], None, **STEP)


def native(*lists):
    laprop(*lists, **STEP, backend="cpu")


def check(step):
    """A step's results must be those of fp64, before anything is timed."""
    lists, truth = make(100_003), make(100_003, torch.float64)
    step(*lists)
    eager(*truth)
    for got, want in zip((lists[0], lists[2], lists[3]), (truth[0], truth[2], truth[3]), strict=True):
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def tensors():
    return make(PARAMETERS)


@pytest.fixture(scope="module")
def compiled():
    step = torch.compile(eager, fullgraph=True)
    try:
        step(*make(1024))
    except Exception as error:  # whatever keeps the compiler from working here
        pytest.skip(f"torch.compile does not work here: {str(error).splitlines()[0]}")
    return step


@pytest.mark.skipif(
    bool(dispatch.missing("laprop", "cpu", "cpu")), reason=str(dispatch.missing("laprop", "cpu", "cpu"))
)
def bench_native(benchmark, record, limits, tensors):
    check(native)
    benchmark.pedantic(native, tensors, **TIMING)
    goals = {"eager": 8, "torch.compile": 0.95}
    record("laprop 20M", "C++", bytes_moved=BYTES, limit=limits.bandwidth(), target=goals)


def bench_eager(benchmark, record, tensors):
    check(eager)
    benchmark.pedantic(eager, tensors, **{**TIMING, "rounds": 10, "warmup_rounds": 2})
    record("laprop 20M", "eager", bytes_moved=BYTES, rival=True)


def bench_compiled(benchmark, record, tensors, compiled):
    check(compiled)
    benchmark.pedantic(compiled, tensors, **TIMING)
    record("laprop 20M", "torch.compile", bytes_moved=BYTES, rival=True)
