"""swiglu: every backend against plain PyTorch in the same precision and in fp64."""

import importlib

import pytest
import torch
from helpers.numerics import assert_close_to_fp64, implementations, skip_where_unsupported, strange_nans
from torch.utils._python_dispatch import TorchDispatchMode

from dph_kernels import dispatch
from dph_kernels.swiglu import swiglu

reference = importlib.import_module("dph_kernels.swiglu.reference")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1), (2, 3), (63, 64), (65, 111), (257, 2), (5, 2048)]
BACKENDS = pytest.mark.parametrize(("device", "backend"), implementations("swiglu"))
ALL_BUT_FP64 = pytest.mark.parametrize("dtype", DTYPES[:3])


def make(rows, width, dtype=torch.float32, device="cpu"):
    """projected and bias."""
    return [torch.randn(*size, 2 * width, device=device).to(dtype).requires_grad_() for size in ((rows,), ())]


def eager(projected, bias=None):
    """What one would write."""
    x, gate = (projected if bias is None else projected + bias).chunk(2, -1)
    return x * torch.nn.functional.silu(gate)


def gradients(run, inputs, grad=None):
    """The result and the gradient of each input."""
    out = run(*inputs)
    grad = torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out) if grad is None else grad
    return [out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))]


def ours(backend):
    return lambda *inputs: swiglu(*inputs, backend=backend)


def compare(inputs, backend, grad=None):
    """Values and gradients of an operator call against eager PyTorch."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn_like(eager(*inputs)) if grad is None else grad
    results = [gradients(run, x, grad) for run, x in ((ours(backend), inputs), (eager, inputs), (eager, wide))]
    # On a GPU exp and quotients are some units in the last place off.
    floor = 4e-6 if backend == "triton" and grad.is_cuda and grad.dtype == torch.float32 else None
    names = "result", "gradient of projected", "gradient of bias"
    for name, got, same, truth in zip(names, *results, strict=False):
        assert got.dtype == inputs[0].dtype
        assert_close_to_fp64(got, same, truth, name, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@BACKENDS
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, device, backend, dtype):
    skip_where_unsupported("swiglu", device, backend, dtype)
    inputs = make(*size, dtype, device)
    compare(inputs, backend)
    compare(inputs[:1], backend)


@ALL_BUT_FP64
@BACKENDS
@pytest.mark.parametrize("layout", ["transposed", "strided", "one row", "one column", "every third", "shifted"])
def test_any_strides(layout, device, backend, dtype):
    skip_where_unsupported("swiglu", device, backend, dtype)
    projected, bias = (x.detach() for x in make(64, 65, dtype, device))
    projected, bias = {
        "transposed": lambda: (projected.T.contiguous().T, bias),
        "strided": lambda: (projected[:, ::5], bias[::5]),
        "one row": lambda: (projected[:1].expand(64, -1), bias),
        "one column": lambda: (projected[:, :1].expand(-1, 130), bias[:1].expand(130)),
        "every third": lambda: (projected[1::3], bias),
        "shifted": lambda: (projected[:, 1:-1], bias[1:-1]),
    }[layout]()
    compare([projected.requires_grad_(), bias.requires_grad_()], backend)


@ALL_BUT_FP64
@BACKENDS
@pytest.mark.parametrize("kind", ["expanded", "expanded rows", "transposed", "strided"])
def test_any_upstream_gradient(kind, device, backend, dtype):
    skip_where_unsupported("swiglu", device, backend, dtype)
    grad = torch.randn(66, 66, device=device).to(dtype)
    grad = {
        "expanded": grad[0, 0].expand(65, 33), "expanded rows": grad[0, :33].expand(65, 33),
        "transposed": grad[:33, :65].T, "strided": grad[1:, ::2],
    }[kind]  # fmt: skip
    compare(make(65, 33, dtype, device), backend, grad)


@ALL_BUT_FP64
@BACKENDS
def test_no_rows(device, backend, dtype):
    skip_where_unsupported("swiglu", device, backend, dtype)
    out, d_projected, d_bias = gradients(ours(backend), make(0, 3, dtype, device))
    assert out.shape == (0, 3)
    assert d_projected.shape == (0, 6)
    assert torch.equal(d_bias, torch.zeros_like(d_bias))


@BACKENDS
@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 1e30), (torch.float16, 6e4), (torch.bfloat16, 1e30)])
def test_extreme_values(dtype, large, device, backend):
    """Gates for which exp leaves fp32, and numbers next to fp16's largest; what fits is finite."""
    skip_where_unsupported("swiglu", device, backend, dtype)
    gate = torch.tensor([-large, -1e4, -100, -88.5, -87, -20, 0, 0.5, 20, 88, 100, 1e4, large], device=device)
    for x in (1.0, -large):
        projected = torch.cat([torch.full_like(gate, x), gate])[None].to(dtype).requires_grad_()
        wide = projected.detach().double().requires_grad_()
        grad = torch.full((1, len(gate)), 0.5, device=device)
        for got, truth in zip(gradients(ours(backend), [projected], grad), gradients(eager, [wide], grad), strict=True):
            torch.testing.assert_close(got, truth.to(dtype), atol=1e-4, rtol=1e-2 if dtype != torch.float32 else 1e-5)


@BACKENDS
def test_infinities_are_as_in_eager_pytorch(device, backend):
    """But where eager's sigmoid is a subnormal number, for gates from -104 to -87, and ours 0."""
    values = torch.tensor([-torch.inf, -1e4, -1.0, 0.0, 2.0, 1e4, torch.inf], device=device)
    projected = torch.cartesian_prod(values, values).T.reshape(1, -1).requires_grad_()
    grad = torch.ones(1, len(values) ** 2, device=device)
    results = [gradients(run, [projected], grad) for run in (ours(backend), eager)]
    torch.testing.assert_close(*results, equal_nan=True)


@ALL_BUT_FP64
@BACKENDS
@pytest.mark.parametrize("nan", strange_nans())
def test_nan_is_not_hidden(nan, device, backend, dtype):
    skip_where_unsupported("swiglu", device, backend, dtype)
    projected, bias, grad = (x.detach() for x in (*make(5, 4, dtype, device), torch.ones(5, 4, device=device)))
    projected[1, 0] = projected[2, 5] = bias[7] = grad[3, 2] = nan
    inputs = [projected.requires_grad_(), bias.requires_grad_()]
    for got, want in zip(gradients(ours(backend), inputs, grad), gradients(eager, inputs, grad), strict=True):
        assert torch.equal(got.isnan(), want.isnan())


@ALL_BUT_FP64
@BACKENDS
@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(device, backend, dtype):
    skip_where_unsupported("swiglu", device, backend, dtype)
    for value in gradients(ours(backend), make(65, 63, dtype, device)):
        assert value.isfinite().all()


@BACKENDS
def test_repeats_are_identical_on_any_number_of_threads(device, backend):
    inputs, threads = make(70, 260, device=device), torch.get_num_threads()
    first = gradients(ours(backend), inputs)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(map(torch.equal, gradients(ours(backend), inputs), first))
    finally:
        torch.set_num_threads(threads)


@BACKENDS
@pytest.mark.parametrize("frozen", [0, 1])
def test_each_gradient_alone(frozen, device, backend):
    inputs = make(65, 33, device=device)
    expected = gradients(ours(backend), inputs)[2 - frozen]
    inputs[frozen].requires_grad_(False)
    (ours(backend)(*inputs) * torch.linspace(-1, 2, 65 * 33, device=device).view(65, 33)).sum().backward()
    assert inputs[frozen].grad is None
    torch.testing.assert_close(inputs[1 - frozen].grad, expected)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_costs_nothing(frozen, monkeypatch):
    asked, original = [], reference.backward

    def backward(**given):
        asked.append((given["projected_needed"], given["bias_needed"]))
        return original(**given)

    monkeypatch.setattr(reference, "backward", backward)
    inputs = make(5, 4)
    inputs[frozen].requires_grad_(False)
    swiglu(*inputs, backend="reference").sum().backward()
    assert asked == [(frozen != 0, frozen != 1)]


@BACKENDS
def test_an_upstream_gradient_whose_sign_is_put_off(device, backend):
    compare(make(5, 33, device=device), backend, torch._neg_view(torch.randn(5, 33, device=device)))


def test_gradcheck():
    assert torch.autograd.gradcheck(ours("reference"), make(5, 4, torch.float64))


@BACKENDS
def test_gradients_of_gradients_are_refused(device, backend):
    projected, bias = make(5, 4, device=device)
    (grad,) = torch.autograd.grad(swiglu(projected, bias, backend=backend).sum(), projected, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@ALL_BUT_FP64
@BACKENDS
def test_opcheck(device, backend, dtype):
    skip_where_unsupported("swiglu", device, backend, dtype)
    projected, bias = make(5, 4, dtype, device)
    for second in (None, bias):
        torch.library.opcheck(torch.ops.dph.swiglu.default, (projected, second, backend))
        tensors = [None if x is None else x.detach() for x in (torch.ones(5, 4, device=device), projected, second)]
        for needs in ((True, second is not None), (True, False), (False, True)):
            torch.library.opcheck(torch.ops.dph.swiglu_backward.default, (*tensors, *needs, backend))


@BACKENDS
def test_who_looks_on_sees_the_operator(device, backend):
    seen = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs = make(5, 4, device=device)
    expected = gradients(ours(backend), inputs)
    with Looking():
        got = gradients(ours(backend), inputs)
    assert {"dph.swiglu.default", "dph.swiglu_backward.default"} <= set(seen)
    assert all(map(torch.equal, got, expected))


def test_shapes_without_memory():
    out, *grads = gradients(swiglu, make(5, 4, device="meta"))
    assert out.shape == (5, 4)
    assert [grad.shape for grad in grads] == [(5, 8), (8,)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", ["auto", "reference", "triton", "cpu"])
def test_compiles_as_one_graph(device, backend):
    """Of the operator where a backend was asked for; else of what the compiler can fuse."""
    if backend != "auto" and (reason := dispatch.missing("swiglu", backend, device)):
        pytest.skip(reason)
    inputs, targets = make(5, 4, device=device), []

    def keep(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    got = gradients(torch.compile(ours(backend), fullgraph=True, backend=keep), inputs)
    assert ("dph.swiglu.default" in targets) == (backend != "auto")
    torch.testing.assert_close(got, gradients(ours(backend), inputs))
    got = gradients(torch.compile(ours(backend), fullgraph=True, backend="aot_eager", dynamic=True), inputs)
    torch.testing.assert_close(got, gradients(ours(backend), inputs))


@BACKENDS
@pytest.mark.usefixtures("overflow_is_an_error")
def test_rows_that_lie_further_apart_than_int32_counts(device, backend):
    """Elements 0, 2**30 and 2**31 of tensors of which only these pages are touched."""
    dtype = torch.bfloat16 if backend == "cpu" else torch.float16
    far = [torch.empty(2**31 + 16, dtype=dtype, device=device).as_strided((3, n), (2**30, 1)) for n in (16, 8)]
    for x in far:
        x.copy_(torch.randn(x.shape))
    bias = make(0, 8, dtype, device)[1]
    results = [
        gradients(ours(backend), [projected.detach().requires_grad_(), bias], grad)
        for projected, grad in (far, [x.clone(memory_format=torch.contiguous_format) for x in far])
    ]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_under_autocast(device):
    """As on inputs cast by hand; gradients come back in fp32."""
    projected, bias = make(5, 4, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = swiglu(projected.bfloat16(), bias)
        assert torch.equal(got, swiglu(projected, bias))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, swiglu(projected.bfloat16(), bias.bfloat16()))
    got.float().sum().backward()
    assert projected.grad.dtype == bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projected": None}, "projected: expected a tensor, got NoneType"),
        ({"projected": torch.zeros(8)}, r"projected: expected shape \[T, 2F\], got \[8\]"),
        ({"projected": torch.zeros(5, 8, dtype=torch.int64)}, "projected: expected float16 or .*float64, got int64"),
        ({"projected": torch.zeros(5, 7)}, r"projected: expected an even, positive number of columns.*got .*\[5, 7\]"),
        ({"projected": torch.zeros(5, 0)}, r"projected: expected an even, positive number of columns.*got .*\[5, 0\]"),
        ({"bias": torch.zeros(4)}, r"bias: expected shape \[8\], got \[4\]"),
        ({"bias": torch.zeros(8).half()}, "bias: expected float32, got float16"),
        ({"bias": torch.zeros(8, device="meta")}, "bias: expected a tensor on cpu, got one on meta"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        swiglu(**{"projected": torch.zeros(5, 8), "bias": torch.zeros(8), **change})


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match=r"swiglu: backend 'cuda' cannot run: .+"):
        swiglu(torch.zeros(5, 8), backend="cuda")
