"""LaProp: every backend against fp64, the paper's own numbers, and what other optimizers got wrong."""

import contextlib
import math

import pytest
import torch
from helpers.numerics import assert_close_to_fp64, implementations
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from dph_kernels import dispatch, gradient_norm, laprop, native
from dph_kernels.laprop import native as laprop_native

SIZES = [(0,), (1,), (3,), (63,), (257,), (33, 17), (16384,), (16385,), (100003,)]
COEFFICIENTS = {
    "lr": 3e-3,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "prior_decay": 0.5,
    "bias_correction": math.sqrt(1 - 0.95**3),
    "momentum_scale": 1 / 0.271,
}
backends = pytest.mark.parametrize(("device", "backend"), implementations("laprop"))


def make(sizes, device="cpu", *, grad_dtype=torch.float32, prior_dtype=torch.float32, offset=0):
    """Lists of tensors as at some later step; with ``offset`` every tensor starts between two vector boundaries."""

    def tensors(dtype=torch.float32, scale=1.0):
        flat = [(torch.randn(math.prod(size) + offset) * scale).to(device, dtype)[offset:] for size in sizes]
        return [x.view(size) for x, size in zip(flat, sizes, strict=True)]

    return {
        "params": tensors(),
        "grads": tensors(grad_dtype, 0.1),
        "exp_avg": tensors(scale=1e-3),
        "exp_avg_sq": [x.square() if offset == 0 else x.square_() for x in tensors(scale=0.1)],
        "priors": tensors(prior_dtype),
        "copies": tensors(torch.bfloat16),
    }


def clone(lists, dtype=None):
    """The same values elsewhere; ``dtype`` for everything but the bf16 copies."""
    return {
        name: [x.clone() if dtype is None or name == "copies" else x.to(dtype, copy=True) for x in tensors]
        for name, tensors in lists.items()
    }


def run(lists, backend, **changes):
    laprop(**lists, **{**COEFFICIENTS, **changes}, backend=backend)
    return lists


def assert_step(lists, backend, **changes):
    """Run one step on ``lists`` and compare with fp64 by the error rule; the copies must be the rounded weights."""
    truth = run(clone(lists, torch.float64), "reference", **changes)
    single = run(clone(lists), "reference", **changes)
    got = run(lists, backend, **changes)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        for i, tensors in enumerate(zip(got[name], single[name], truth[name], strict=True)):
            assert_close_to_fp64(*tensors, name=f"{name}[{i}]")
    if "copies" in got:
        for copy, param in zip(got["copies"], got["params"], strict=True):
            assert torch.equal(copy, param.to(torch.bfloat16))


@backends
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prior_dtype", [torch.float32, torch.bfloat16])
def test_many_tensors_match_fp64(device, backend, grad_dtype, prior_dtype, offset):
    lists = make(SIZES, device, grad_dtype=grad_dtype, prior_dtype=prior_dtype, offset=offset)
    assert_step(lists, backend, grad_scale=torch.full((1,), 0.37, device=device))


@backends
@pytest.mark.parametrize("size", SIZES)
def test_each_size_alone(device, backend, size):
    assert_step(make([size], device), backend)


@backends
@pytest.mark.parametrize("absent", [("priors",), ("copies",), ("priors", "copies")])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prior_dtype", [torch.float32, torch.bfloat16])
def test_without_priors_and_copies(device, backend, absent, grad_dtype, prior_dtype):
    lists = make([(257,), (20011,)], device, grad_dtype=grad_dtype, prior_dtype=prior_dtype)
    for name in absent:
        del lists[name]
    assert_step(lists, backend, prior_decay=0.0 if "priors" in absent else 0.5)


@backends
@pytest.mark.parametrize("sizes", [[()], [(), (3,), (2, 2)]])
def test_numbers_are_parameters_too(device, backend, sizes):
    """With the scale as `gradient_norm` gives it, [1]."""
    lists = make(sizes, device)
    scale = gradient_norm(lists["grads"], max_norm=0.01, backend=backend).scale
    assert_step(lists, backend, grad_scale=scale)
    assert [x.shape for x in lists["params"]] == [torch.Size(s) for s in sizes]


@backends
def test_learning_rate_zero_moves_by_momentum_alone(device, backend):
    lists = make([(63,)], device)
    before, momentum = lists["params"][0].clone(), lists["exp_avg"][0].clone()
    run(lists, backend, lr=0.0, momentum_scale=1.0)
    torch.testing.assert_close(lists["exp_avg"][0], 0.9 * momentum)
    torch.testing.assert_close(lists["params"][0], before - lists["exp_avg"][0])


@backends
def test_no_gradient_at_all_stays_finite_and_decays(device, backend):
    size = (100,)
    lists = {name: [torch.zeros(size, device=device)] for name in ("grads", "exp_avg", "exp_avg_sq")}
    run({"params": [torch.ones(size, device=device)], "priors": [torch.zeros(size, device=device)], **lists}, backend)
    assert lists["exp_avg"][0].count_nonzero() == 0
    param = torch.ones(size, device=device)
    run({"params": [param], "priors": [torch.zeros(size, device=device)], **lists}, backend, eps=1e-8)
    torch.testing.assert_close(param, torch.full(size, 1 - 3e-3 * (0.5 + 0.1), device=device))


@backends
def test_tiny_second_moments_do_no_harm(device, backend):
    """Second moments below 1e-38 may be flushed to zero, which must not show in the weights."""
    lists = make([(64,)], device)
    lists["exp_avg_sq"][0].fill_(1e-41)
    lists["grads"][0].zero_()
    truth = run(clone(lists, torch.float64), "reference")
    single = run(clone(lists), "reference")
    run(lists, backend)
    for name in ("params", "exp_avg"):
        assert_close_to_fp64(lists[name][0], single[name][0], truth[name][0], name)
    assert 0 <= lists["exp_avg_sq"][0].min() <= lists["exp_avg_sq"][0].max() <= 1e-41


@backends
def test_bfloat16_copy_rounds_to_nearest_even(device, backend):
    """1 + k/256 for odd k lies halfway between two bf16 numbers; too large becomes infinite; a NaN stays one."""
    param = torch.tensor([1 + 1 / 256, 1 + 3 / 256, -1 - 1 / 256, 3.4e38, -3.4e38, math.nan], device=device)
    expected = [1.0, 1 + 4 / 256, -1.0, math.inf, -math.inf]
    copy = torch.zeros(6, dtype=torch.bfloat16, device=device)
    grad, exp_avg, exp_avg_sq = (torch.zeros_like(param) for _ in range(3))
    laprop([param], [grad], [exp_avg], [exp_avg_sq], copies=[copy], lr=0.0, backend=backend)
    assert copy.tolist()[:5] == expected
    assert copy[5].isnan()


@backends
def test_float16_copies_receive_the_rounded_weights(device, backend):
    """Also beside bfloat16 ones; 1 + k/2048 for odd k lies halfway between two fp16 numbers."""
    lists = make([(257,), (5,)], device)
    lists["copies"][0] = lists["copies"][0].half()
    lists["params"][1] = torch.tensor([1 + 1 / 2048, 1 + 3 / 2048, 7e4, -7e4, math.nan], device=device)
    lists["copies"][1] = torch.zeros(5, dtype=torch.float16, device=device)
    mixed = clone(lists)
    mixed["copies"][0] = torch.zeros(257, dtype=torch.bfloat16, device=device)
    run(lists, backend)
    assert torch.equal(lists["copies"][0], lists["params"][0].half())
    run(mixed, backend, lr=0.0, momentum_scale=0.0)
    assert torch.equal(mixed["copies"][0], mixed["params"][0].bfloat16())
    assert mixed["copies"][1].tolist()[:4] == [1.0, 1 + 4 / 2048, math.inf, -math.inf]
    assert mixed["copies"][1][4].isnan()


@backends
@pytest.mark.parametrize(
    ("tag", "changes"),
    [("plain", {}), ("weight_decay", {"weight_decay": 0.1}), ("prior_decay", {"prior_decay": 0.5})],
)
def test_golden_numbers(device, backend, tag, changes, shared):
    """Ten steps of the paper's own code under a changing learning rate."""
    io = {name: x.to(device) for name, x in load_file(shared / "golden" / "laprop.safetensors").items()}
    params = [io[f"param{i}.initial"].clone() for i in range(3)]
    priors = [x.clone() for x in params]
    exp_avg, exp_avg_sq = ([torch.zeros_like(x) for x in params] for _ in range(2))
    scale = 0.0
    for step, rate in enumerate(io["lr"].tolist()):
        scale = 0.9 * scale + 0.1 * rate
        laprop(
            params,
            [io[f"param{i}.grad.step{step}"] for i in range(3)],
            exp_avg,
            exp_avg_sq,
            priors,
            lr=rate,
            bias_correction=math.sqrt(1 - 0.95 ** (step + 1)),
            momentum_scale=rate / scale if rate else 1.0,
            backend=backend,
            **changes,
        )
        for i, param in enumerate(params):
            torch.testing.assert_close(param, io[f"{tag}.param{i}.step{step}"], rtol=0, atol=2e-6)


@backends
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_the_number_of_threads(device, backend, threads):
    lists = make([(40000,), (7,), (0,), (70001,)], device)
    before, many = torch.get_num_threads(), clone(lists)
    try:
        torch.set_num_threads(threads)
        run(lists, backend)
    finally:
        torch.set_num_threads(before)
    run(many, backend)
    for name in ("params", "exp_avg", "exp_avg_sq", "copies"):
        assert all(map(torch.equal, lists[name], many[name])), name


@backends
def test_opcheck(device, backend):
    lists = make([(33, 17), (5,)], device)
    arguments = [[x.flatten()[:5].clone() for x in lists[name]] for name in lists]
    scale = torch.full((1,), 0.5, device=device)
    clock, rate = (torch.zeros(n, dtype=torch.float64, device=device) for n in (2, 1))
    numbers = [COEFFICIENTS[name] for name in COEFFICIENTS]
    torch.library.opcheck(torch.ops.dph.laprop.default, (*arguments, scale, None, None, *numbers, backend))
    torch.library.opcheck(torch.ops.dph.laprop.default, (*arguments, scale, clock, rate, *numbers, backend))


@backends
def test_compiles_into_one_graph(device, backend):
    lists = make([(33, 17), (1000,)], device)
    eager = run(clone(lists), backend)
    torch.compile(run, fullgraph=True, backend="aot_eager")(lists, backend)
    for name in ("params", "exp_avg", "exp_avg_sq", "copies"):
        assert all(map(torch.equal, lists[name], eager[name])), name


@pytest.mark.parametrize("watched", [False, True])
def test_autograd_notices_what_is_written(watched):
    """Where somebody looks on, too, and the call goes through PyTorch's dispatcher."""
    lists = make([(10,)])
    param = lists["params"][0].requires_grad_()
    written = [lists[name][0] for name in ("params", "exp_avg", "exp_avg_sq", "copies")]
    versions, before = [x._version for x in written], param.detach().clone()
    with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
        run(lists, "auto")
    assert all(x._version > version for x, version in zip(written, versions, strict=True))
    assert not torch.equal(param, before)
    assert param.grad_fn is None


def test_a_profile_shows_the_step():
    with torch.profiler.profile() as found:
        run(make([(10,)]), "auto")
    assert "dph::laprop" in {event.key for event in found.key_averages()}


def test_no_parameters():
    laprop([], [], [], [], lr=1e-3)


@pytest.mark.skipif(dispatch.missing("laprop", "cpu", "cpu") is not None, reason="the C++ module is not built")
def test_offsets_beyond_two_to_the_31_in_the_kernel():
    """The C++ kernel works on elements 2**31 to 2**31 + 4, without 34 GB of memory.

    The call's table says that the tensor's earlier chunks are done and its addresses lie 2**31 elements before the
    memory that is there, so any index or offset of 32 bits would miss it.
    """
    kernels, start, tail = native.module(), 2**31, 5
    lists = make([(tail,)])
    del lists["copies"]
    expected = run(clone(lists), "cpu")
    columns = (lists[name][0] for name in ("params", "exp_avg", "exp_avg_sq", "grads", "priors"))
    addresses = [x.data_ptr() - 4 * start for x in columns]
    table = torch.tensor([[*addresses, 0, start + tail, -(start // kernels.LAPROP_CHUNK), 0]])
    arguments = kernels.LapropArguments(table=table.data_ptr(), count=1, chunks=1, grad_scale=0, **COEFFICIENTS)
    kernels.laprop_cpu(arguments, 1)
    for name in ("params", "exp_avg", "exp_avg_sq"):
        assert torch.equal(lists[name][0], expected[name][0]), name


def test_table_counts_beyond_two_to_the_31():
    huge, small = torch.zeros(1).expand(2**31 + 5), torch.zeros(10)
    tensors = [huge, small]
    words, chunks = laprop_native._table([*[tensors] * 4, [], []], tensors, [], 16384)
    assert [words[at + 6 : at + 8].tolist() for at in (0, 9)] == [[2**31 + 5, 0], [10, 2**17 + 1]]
    assert chunks == 2**17 + 2


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements_on_a_gpu():
    size = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 4 * 4 * size + 2**30:
        pytest.skip("needs 35 GB of free GPU memory")
    lists = {name: [torch.zeros(size, device="cuda")] for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
    lists["grads"][0][-1] = 1.0
    laprop(**lists, lr=1e-3, backend="cuda")
    assert lists["params"][0][-1] < 0
    assert lists["params"][0].count_nonzero() == 1
    assert lists["exp_avg_sq"][0][-1].item() == pytest.approx(0.05)


BAD = {
    "grads": (lambda a: a["grads"].pop(), "grads: expected 2 tensors as in params, got 1"),
    "shape": (lambda a: a["exp_avg"].__setitem__(1, torch.zeros(4)), r"exp_avg\[1\]: expected shape \[5\], got \[4\]"),
    "state dtype": (
        lambda a: a["exp_avg_sq"].__setitem__(0, torch.zeros(4, 6, dtype=torch.bfloat16)),
        r"exp_avg_sq\[0\]: expected float32, got bfloat16",
    ),
    "param dtype": (
        lambda a: a["params"].__setitem__(0, torch.zeros(4, 6, dtype=torch.bfloat16)),
        r"params\[0\]: expected float32 or float64, got bfloat16",
    ),
    "grad dtype": (
        lambda a: a["grads"].__setitem__(0, torch.zeros(4, 6, dtype=torch.int32)),
        r"grads\[0\]: expected float32 or bfloat16 or float16, got int32$",
    ),
    "no grad": (lambda a: a["grads"].__setitem__(0, None), r"grads\[0\]: expected a tensor, got NoneType"),
    "no param": (lambda a: a["params"].__setitem__(0, None), r"params\[0\]: expected a tensor, got NoneType"),
    "second param": (lambda a: a["params"].__setitem__(1, 1.0), r"params\[1\]: expected a tensor, got float"),
    "copy dtype": (
        lambda a: a["copies"].__setitem__(0, torch.zeros(4, 6)),
        r"copies\[0\]: expected bfloat16 or float16, got float32",
    ),
    "layout": (
        lambda a: a["grads"].__setitem__(0, torch.zeros(6, 4).t()),
        r"grads\[0\]: expected a contiguous tensor, got strides \(1, 4\)",
    ),
    "expanded": (
        lambda a: a["grads"].__setitem__(0, torch.zeros(1, 1).expand(4, 6)),
        r"grads\[0\]: expected a contiguous tensor, got strides \(0, 0\)",
    ),
    "device": (
        lambda a: a["priors"].__setitem__(0, torch.zeros(4, 6, device="meta")),
        r"priors\[0\]: expected a tensor on cpu, got one on meta",
    ),
    "no priors": (
        lambda a: a.pop("priors"),
        "priors: expected one tensor per parameter as prior_decay is 0.5, got None",
    ),
    "grad_scale shape": (lambda a: a.update(grad_scale=torch.ones(2)), r"grad_scale: expected shape \[1\], got \[2\]"),
    "grad_scale dtype": (
        lambda a: a.update(grad_scale=torch.ones(1, dtype=torch.float64)),
        "grad_scale: expected float32, got float64",
    ),
    "grad_scale type": (lambda a: a.update(grad_scale=0.5), "grad_scale: expected a tensor, got float"),
    "lr": (lambda a: a.update(lr=-1.0), "lr: expected 0.0 <= lr <= inf, got -1.0"),
    "lr nan": (lambda a: a.update(lr=math.nan), "lr: expected 0.0 <= lr <= inf, got nan"),
    "bias_correction": (lambda a: a.update(bias_correction=math.nan), "bias_correction: expected .*, got nan"),
    "momentum_scale": (lambda a: a.update(momentum_scale=math.inf), "momentum_scale: expected .* < inf, got inf"),
    "beta1": (lambda a: a.update(beta1=1.0), "beta1: expected 0.0 <= beta1 < 1.0, got 1.0"),
    "backend": (lambda a: a.update(backend="fast"), "backend: expected one of 'auto', .*, got 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    spoil, message = BAD[case]
    lists = make([(4, 6), (5,)])
    params = [x.clone() for x in lists["params"]]
    arguments = {**{name: list(tensors) for name, tensors in lists.items()}, **COEFFICIENTS}
    spoil(arguments)
    with pytest.raises(ValueError, match=message):
        laprop(**arguments)
    assert all(map(torch.equal, lists["params"][1:], params[1:])), "an error must leave the weights alone"


def test_float64_by_the_native_kernel_is_refused():
    lists = clone(make([(5,)]), torch.float64)
    with pytest.raises(ValueError, match=r"params\[0\]: expected float32 for backend 'cpu', got float64"):
        run(lists, "cpu")


def test_cuda_by_name_on_cpu_tensors_says_why():
    with pytest.raises(RuntimeError, match="laprop: backend 'cuda' cannot run: the cuda kernel works on CUDA tensors"):
        run(make([(5,)]), "cuda")
