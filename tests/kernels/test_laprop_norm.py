"""The norm of all gradients, its clip coefficient and the finite check: every backend against the exact sum."""

import math

import pytest
import torch
from helpers.numerics import implementations

from dph_kernels import dispatch, gradient_norm, native
from dph_kernels.laprop import native as laprop_native

SIZES = [(0,), (1,), (15,), (16,), (17,), (63,), (257,), (33, 17), (16384,), (16385,), (100003,)]
backends = pytest.mark.parametrize(("device", "backend"), implementations("laprop"))


def make(sizes, device="cpu", dtype=torch.float32, offset=0):
    """Gradients of many magnitudes; with ``offset`` each starts between two vector boundaries."""
    flat = [(torch.randn(math.prod(s) + offset) * 4.0 ** (i % 5)).to(device, dtype) for i, s in enumerate(sizes)]
    return [x[offset:].view(s) for x, s in zip(flat, sizes, strict=True)]


def exact(grads):
    """The norm from a sum without any rounding."""
    return math.sqrt(math.fsum(v * v for g in grads for v in g.flatten().tolist()))


def assert_norm(grads, backend, max_norm=math.inf):
    got, want = gradient_norm(grads, max_norm=max_norm, backend=backend), exact(grads)
    assert {t.device for t in got} == {grads[0].device}
    assert [(t.dtype, list(t.shape)) for t in got] == [(torch.float64, []), (torch.float32, [1]), (torch.bool, [])]
    assert got.norm.item() == pytest.approx(want, rel=1e-13, abs=0)
    assert got.scale.item() == pytest.approx(min(1.0, max_norm / want) if want else 1.0, rel=1e-7, abs=0)
    assert got.finite.item() is True


@backends
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_tensors(device, backend, dtype, offset, poisoned_empty):
    assert_norm(make(SIZES, device, dtype, offset), backend, max_norm=1.0)


@backends
def test_dtypes_may_differ(device, backend):
    grads = [g for dtype in (torch.float32, torch.bfloat16, torch.float16) for g in make([(300,)], device, dtype)]
    assert_norm(grads, backend, max_norm=1.0)


@backends
@pytest.mark.parametrize("size", SIZES)
def test_each_size_alone(device, backend, size, poisoned_empty):
    assert_norm(make([size], device), backend, max_norm=0.1)


@backends
@pytest.mark.parametrize("power", [-140, -126, -60, 60, 120, 127])
def test_extremes_neither_overflow_nor_vanish(device, backend, power):
    """Squares of such fp32 numbers are infinite or zero in fp32; nothing is flushed, subnormal numbers included."""
    grads = [torch.full((1000,), 2.0**power, device=device), torch.zeros(3, device=device)]
    got = gradient_norm(grads, max_norm=1.0, backend=backend)
    assert got.norm.item() == pytest.approx(2.0**power * math.sqrt(1000), rel=1e-13, abs=0)
    assert got.finite.item() is True
    assert got.scale.item() == pytest.approx(min(1.0, 2.0**-power / math.sqrt(1000)), rel=1e-4, abs=0)


@backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 16390), (2, 5)])
def test_one_number_that_is_not_finite_shows(device, backend, bad, place):
    grads = make([(1,), (20000,), (6,)], device)
    grads[place[0]][place[1]] = bad
    norm, scale, finite = gradient_norm(grads, max_norm=1.0, backend=backend)
    assert not norm.isfinite()
    assert scale.isnan()
    assert finite.item() is False


@backends
def test_zero_gradients_are_not_scaled(device, backend):
    for sizes in ([(0,)], [(5,), (0,)]):
        norm, scale, finite = gradient_norm([torch.zeros(s, device=device) for s in sizes], backend=backend)
        assert (norm.item(), scale.item(), finite.item()) == (0.0, 1.0, True)
        assert gradient_norm([torch.zeros(5, device=device)], max_norm=0.0, backend=backend).scale.item() == 1.0


def test_no_gradients():
    norm, scale, finite = gradient_norm([], max_norm=1.0)
    assert (norm.item(), scale.item(), finite.item()) == (0.0, 1.0, True)


@backends
def test_the_same_bits_every_time_on_any_number_of_threads(device, backend):
    if (device, backend) == ("cpu", "reference"):
        pytest.skip("plain PyTorch sums on the CPU in an order that depends on the threads")
    grads = make([(70001,), (7,), (0,), (400000,)], device)
    before, found = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.add(gradient_norm(grads, backend=backend).norm.item())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


def test_float64_goes_to_the_reference():
    grads = make([(300,)], dtype=torch.float64)
    assert_norm([*grads, *make([(5,)])], "auto")
    with pytest.raises(ValueError, match=r"grads\[0\]: expected float32 or a half for backend 'cpu', got float64"):
        gradient_norm(grads, backend="cpu")


@backends
def test_opcheck(device, backend):
    torch.library.opcheck(torch.ops.dph.gradient_norm.default, (make([(33, 17), (5,)], device), 1.0, backend))


@backends
def test_compiles_into_one_graph(device, backend):
    grads = make([(33, 17), (1000,)], device)
    clip = lambda grads: gradient_norm(grads, max_norm=1.0, backend=backend)  # noqa: E731
    compiled = torch.compile(clip, fullgraph=True, backend="aot_eager")(grads)
    assert all(map(torch.equal, compiled, clip(grads)))


def test_gradients_that_require_gradients():
    grads = [g.requires_grad_() for g in make([(10,)])]
    assert not any(t.requires_grad for t in gradient_norm(grads))


@pytest.mark.skipif(dispatch.missing("laprop", "cpu", "cpu") is not None, reason="the C++ module is not built")
def test_offsets_beyond_two_to_the_31_in_the_kernel():
    """Elements 2**31 to 2**31 + 4, at an address that lies 2**31 elements before the memory that is there."""
    kernels, start, (grad,) = native.module(), 2**31, make([(5,)])
    table = torch.tensor([[grad.data_ptr() - 4 * start, start + 5, -(start // kernels.LAPROP_CHUNK), 0]])
    dtypes = {"partials": torch.float64, "norm": torch.float64, "scale": torch.float32, "finite": torch.bool}
    results = {name: torch.zeros(1, dtype=dtype) for name, dtype in dtypes.items()}
    addresses = {name: x.data_ptr() for name, x in results.items()}
    arguments = kernels.GradientNormArguments(table=table.data_ptr(), count=1, chunks=1, max_norm=1.0, **addresses)
    kernels.gradient_norm_cpu(arguments, 1)
    assert results["norm"].item() == pytest.approx(exact([grad]), rel=1e-13)
    assert results["scale"].item() == pytest.approx(min(1.0, 1 / exact([grad])))
    assert results["finite"].item()


def test_table_counts_beyond_two_to_the_31():
    huge, small = torch.zeros(1).expand(2**31 + 5), torch.zeros(10, dtype=torch.bfloat16)
    words, chunks = laprop_native._table([[huge, small]], [huge, small], [], 16384)
    assert [words[at + 1 : at + 4].tolist() for at in (0, 4)] == [[2**31 + 5, 0, 0], [10, 2**17 + 1, 1]]
    assert chunks == 2**17 + 2


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements_on_a_gpu():
    size = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 4 * size + 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    grad = torch.zeros(size, device="cuda")
    grad[-1] = 3.0
    grad[0] = 4.0
    assert gradient_norm([grad, grad[:1]], backend="cuda").norm.item() == pytest.approx(math.sqrt(41))


BAD = {
    "dtype": (
        lambda a: a.update(grads=[torch.zeros(3, dtype=torch.int32)]),
        r"grads\[0\]: expected float32 or .*int32",
    ),
    "first": (lambda a: a.update(grads=[[1.0]]), r"grads\[0\]: expected a tensor, got list"),
    "none": (lambda a: a["grads"].append(None), r"grads\[1\]: expected a tensor, got NoneType"),
    "device": (
        lambda a: a["grads"].append(torch.zeros(3, device="meta")),
        r"grads\[1\]: expected a tensor on cpu, got",
    ),
    "layout": (lambda a: a["grads"].append(torch.zeros(3, 2).t()), r"grads\[1\]: expected a contiguous tensor, got"),
    "limit": (lambda a: a.update(max_norm=-1.0), "max_norm: expected 0.0 <= max_norm <= inf, got -1.0"),
    "limit nan": (lambda a: a.update(max_norm=math.nan), "max_norm: expected .* got nan"),
    "backend": (lambda a: a.update(backend="fast"), "backend: expected one of 'auto', .*, got 'fast'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    spoil, message = BAD[case]
    arguments = {"grads": make([(5,)]), "max_norm": 1.0}
    spoil(arguments)
    with pytest.raises(ValueError, match=message):
        gradient_norm(**arguments)
