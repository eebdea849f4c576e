"""LaProp where nothing waits for the device: the clock, rates in tensors, steps that change nothing, CUDA graphs."""

import math

import pytest
import torch
from helpers.numerics import implementations

from dph_kernels import gradient_norm, laprop
from dph_kernels.laprop import native as laprop_native

SIZES = [(0,), (3,), (257,), (20011,)]
RATES = [0.01, 0.02, 0.0, 0.03, 0.005]
DECAYS = {"weight_decay": 0.1, "prior_decay": 0.5}
backends = pytest.mark.parametrize(("device", "backend"), implementations("laprop"))


def make(device="cpu", dtype=torch.float32, copies=torch.bfloat16):
    tensors = lambda scale=1.0: [(torch.randn(s) * scale).to(device, dtype) for s in SIZES]  # noqa: E731
    lists = {"params": tensors(), "grads": tensors(0.1), "exp_avg": tensors(1e-3), "priors": tensors()}
    lists["exp_avg_sq"] = [x.square() for x in tensors(0.1)]
    return {**lists, "copies": [x.to(copies) for x in lists["params"]]}


def clone(lists):
    return {name: [x.clone() for x in tensors] for name, tensors in lists.items()}


def new_clock(device="cpu"):
    return torch.zeros(2, dtype=torch.float64, device=device)


def assert_same(one, two):
    for name in one:
        assert all(map(torch.equal, one[name], two[name])), name


def corrected(lists, backend, rates, **options):
    """Steps with the corrections that a caller computes."""
    average = 0.0
    for step, rate in enumerate(rates, 1):
        average = 0.9 * average + 0.1 * rate
        corrections = {
            "bias_correction": math.sqrt(1 - 0.95**step),
            "momentum_scale": rate / average if rate else 1.0,
        }
        laprop(**lists, lr=rate, **corrections, **DECAYS, backend=backend, **options)
    return average


@backends
@pytest.mark.parametrize("kind", [None, torch.float32, torch.float64])
def test_the_clock_gives_the_corrections(device, backend, kind):
    """Bit for bit on the CPU; a GPU's pow may differ in the last place of fp64."""
    lists, clock = make(device), new_clock(device)
    truth = clone(lists)
    rates = RATES if kind is None else torch.tensor(RATES, dtype=kind).tolist()
    average = corrected(truth, backend, rates)
    for rate in rates:
        lr = rate if kind is None else torch.full((1,), rate, dtype=kind, device=device)
        laprop(**lists, lr=lr, clock=clock, **DECAYS, backend=backend)
    assert clock.tolist() == pytest.approx([len(RATES), average], rel=1e-14)
    if device == "cpu":
        assert_same(lists, truth)
    else:
        for name in lists:
            torch.testing.assert_close(lists[name], truth[name], rtol=1e-6, atol=1e-7)


@backends
@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("copies", [torch.bfloat16, torch.float16])
def test_a_scale_that_is_not_finite_changes_nothing(device, backend, scale, copies):
    lists, clock = make(device, copies=copies), new_clock(device)
    laprop(**lists, lr=0.01, clock=clock, **DECAYS, backend=backend)
    for copy in lists["copies"]:
        copy.fill_(7.0)  # not even rewritten
    before, time = clone(lists), clock.clone()
    scale = torch.full((1,), scale, device=device)
    laprop(**lists, lr=0.02, clock=clock, **DECAYS, grad_scale=scale, backend=backend)
    assert_same(lists, before)
    assert torch.equal(clock, time)
    laprop(**lists, lr=0.02, bias_correction=0.3, **DECAYS, grad_scale=scale, backend=backend)
    assert_same(lists, before)


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_leaves_no_trace_in_later_ones(device, backend, bad):
    """Steps 1, 2, a gradient that is not finite, 3: the same bits as 1, 2, 3."""
    lists, clock = make(device), new_clock(device)
    other, time = clone(lists), clock.clone()
    for step, rate in enumerate(RATES):
        lists["grads"] = other["grads"] = [torch.randn(s).to(device) for s in SIZES]
        norm = gradient_norm(lists["grads"], max_norm=1.0, backend=backend)
        laprop(**lists, lr=rate, clock=clock, **DECAYS, grad_scale=norm.scale, backend=backend)
        laprop(**other, lr=rate, clock=time, **DECAYS, grad_scale=norm.scale, backend=backend)
        if step == 1:
            spoilt = [g.clone() for g in lists["grads"]]
            spoilt[3][17000] = bad
            norm = gradient_norm(spoilt, max_norm=1.0, backend=backend)
            laprop(**{**lists, "grads": spoilt}, lr=0.5, clock=clock, **DECAYS, grad_scale=norm.scale, backend=backend)
    assert_same(lists, other)
    assert torch.equal(clock, time)
    assert clock[0] == len(RATES)


@backends
def test_empty_shards_keep_time(device, backend):
    """A rank whose shards are all empty counts its steps like every other."""
    clock, empty = new_clock(device), [torch.zeros(0, device=device)]
    for rate in (0.1, 0.3):
        laprop(empty, empty, empty, empty, lr=rate, clock=clock, backend=backend)
    assert clock.tolist() == pytest.approx([2, 0.9 * 0.01 + 0.03])


@backends
def test_compiles_with_clock_and_rate(device, backend):
    def step(lists, clock, rate):
        scale = gradient_norm(lists["grads"], max_norm=1.0, backend=backend).scale
        laprop(**lists, lr=rate, clock=clock, grad_scale=scale, backend=backend)

    lists, clock, rate = make(device), new_clock(device), torch.full((), 0.01, device=device)
    del lists["priors"]
    eager, time = clone(lists), clock.clone()
    step(eager, time, rate)
    torch.compile(step, fullgraph=True, backend="aot_eager")(lists, clock, rate)
    assert_same(lists, eager)
    assert torch.equal(clock, time)


@backends
def test_bfloat16_priors_over_ten_thousand_steps(device, backend):
    """A rounded anchor moves a weight by its rounding error times 1 - (1 - lr * prior_decay)^n, and by no more."""
    torch.manual_seed(1)
    steps, rate, size = 10_000, 2e-4, 257
    prior = torch.randn(size)
    gradients = torch.randn(50, size).to(device)

    def run(dtype, anchor, backend):
        param, m, v = (
            prior.to(device, dtype, copy=True),
            *(torch.zeros(size, dtype=dtype, device=device) for _ in range(2)),
        )
        clock, anchor = new_clock(device), anchor.to(device)
        for step in range(steps):
            grads = [gradients[step % 50].to(dtype)]
            laprop([param], grads, [m], [v], [anchor], lr=rate, prior_decay=0.5, clock=clock, backend=backend)
        return param.cpu().double()

    rounded = prior.bfloat16()
    shift = (rounded.double() - prior.double()) * (1 - (1 - rate * 0.5) ** steps)
    exact, got = run(torch.float32, prior, backend), run(torch.float32, rounded, backend)
    noise = 2e-5 * prior.abs().max().item()  # of 10,000 roundings to fp32
    assert (shift.abs() <= 2**-8 * prior.abs()).all()
    assert shift.abs().max() > 50 * noise, "the test would not see a wrong shift"
    torch.testing.assert_close(got - exact, shift, rtol=0, atol=noise)


BAD = {
    "rate": ({"lr": torch.ones(1)}, "lr: expected a number without a clock, got a tensor"),
    "rate shape": ({"lr": torch.ones(2), "clock": new_clock()}, r"lr: expected shape \[1\], got \[2\]"),
    "rate dtype": ({"lr": torch.ones(1).half(), "clock": new_clock()}, "lr: expected float32 or float64, got float16"),
    "rate device": ({"lr": torch.ones(1, device="meta"), "clock": new_clock()}, "lr: expected a tensor on cpu, got"),
    "clock shape": ({"clock": new_clock()[:1]}, r"clock: expected shape \[2\], got \[1\]"),
    "clock dtype": ({"clock": new_clock().float()}, "clock: expected float64, got float32"),
    "clock device": ({"clock": new_clock("meta")}, "clock: expected a tensor on cpu, got one on meta"),
    "clock": ({"clock": (0, 0.0)}, "clock: expected a tensor, got tuple"),
    "prior dtype": ({"priors": [torch.zeros(5).half()]}, r"priors\[0\]: expected bfloat16 or float32, got float16"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, message = BAD[case]
    lists = {name: [torch.zeros(5)] for name in ("params", "grads", "exp_avg", "exp_avg_sq", "priors")}
    with pytest.raises(ValueError, match=message):
        laprop(**{**lists, "lr": 0.1, "prior_decay": 0.5, **changes})


def clipped(lists, clock, rate):
    norm = gradient_norm(lists["grads"], max_norm=1.0, backend="cuda")
    laprop(**lists, lr=rate, clock=clock, **DECAYS, grad_scale=norm.scale, backend="cuda")
    return norm


@pytest.mark.gpu
@pytest.mark.parametrize("known", [False, True])
def test_a_cuda_graph_with_a_changing_rate(known):
    """Also where the tables of these tensors were on the device before, and have been dropped since."""
    lists, clock, rate = make("cuda"), new_clock("cuda"), torch.zeros((), device="cuda")
    before = clone(lists)
    clipped(lists if known else clone(lists), clock.clone(), rate)  # loads the kernels
    for name in lists:
        torch._foreach_copy_(lists[name], before[name])
    eager, time = clone(lists), clock.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clipped(lists, clock, rate)
    assert_same(lists, eager)
    laprop_native._keep.cache_clear()
    other = make("cuda")  # takes the memory that is free now
    gradient_norm(other["grads"], backend="cuda")
    for step, value in enumerate([*RATES, 0.5]):
        gradients = [torch.randn(s).cuda() for s in SIZES]
        if step == len(RATES):
            gradients[2][5] = math.inf
        torch._foreach_copy_(lists["grads"], gradients)
        torch._foreach_copy_(eager["grads"], gradients)
        rate.fill_(value)
        graph.replay()
        assert norm.finite.item() == (step < len(RATES))
        clipped(eager, time, rate)
        assert_same(lists, eager)
        assert torch.equal(clock, time)
    assert clock[0] == len(RATES)


@pytest.mark.gpu
def test_tables_are_kept_by_content():
    lists = make("cuda")
    laprop_native._keep.cache_clear()
    for _ in range(3):
        laprop(**lists, lr=0.01, **DECAYS, backend="cuda")
    assert laprop_native._keep.cache_info()[:2] == (2, 1)  # hits, misses
    lists["grads"][1] = torch.zeros_like(lists["grads"][1])
    laprop(**lists, lr=0.01, **DECAYS, backend="cuda")
    assert laprop_native._keep.cache_info()[:2] == (2, 2)


@pytest.mark.gpu
def test_no_step_waits_for_the_device():
    lists, clock, rate = make("cuda"), new_clock("cuda"), torch.full((), 0.01, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            clipped(lists, clock, rate)
    finally:
        torch.cuda.set_sync_debug_mode("default")
