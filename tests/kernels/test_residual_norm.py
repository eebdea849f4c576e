"""residual_norm: every backend against plain PyTorch in the same precision and in fp64."""

import functools

import pytest
import torch
from helpers.numerics import assert_close_to_fp64, implementations, skip_where_unsupported, strange_nans

from dph_kernels import dispatch, residual_norm

SIZES = [(2, 3), (63, 64), (65, 111), (257, 2), (5, 1536)]
BACKENDS = implementations("residual_norm")
KERNELS = [p for p in BACKENDS if p.values[1] != "reference"]
NATIVE = [p for p in BACKENDS if p.values[1] == "cpu"]
BOTH = ("total", "normed")
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
over_backends = pytest.mark.parametrize(("device", "backend"), BACKENDS)


def make(rows, columns, dtype=torch.float32, device="cpu", without=()):
    """The arguments by name, None for those in ``without``."""
    sizes = {"x": (rows, columns), "update": (rows, columns), "weight": (columns,), "bias": (columns,)}
    return {
        name: None if name in without else torch.randn(size, device=device).to(dtype).requires_grad_()
        for name, size in sizes.items()
    }


def eager(x, update, weight, bias, eps=1e-5):
    total = x if update is None else x + update
    return total, torch.nn.functional.layer_norm(total, x.shape[1:], weight, bias, eps)


def results(function, given, upstream):
    """Both results and all gradients by name, of the outputs for which there is an upstream gradient."""
    outputs = dict(zip(BOTH, function(**given), strict=True))
    wanted = {name: x for name, x in given.items() if x is not None and x.requires_grad}
    used = [outputs[name] for name in upstream]
    found = torch.autograd.grad(used, tuple(wanted.values()), tuple(upstream.values()), allow_unused=True)
    return outputs | {f"gradient of {name}": grad for name, grad in zip(wanted, found, strict=True)}


def ours(backend, **options):
    return functools.partial(residual_norm, backend=backend, **options)


def compare(given, backend, upstream=None, eps=1e-5):
    """Results and gradients of an operator call against eager PyTorch; returns the operator's."""
    if upstream is None:
        upstream = {name: torch.randn_like(given["x"]) for name in BOTH}
    wide = {name: None if x is None else x.detach().double().requires_grad_() for name, x in given.items()}
    got = results(ours(backend, eps=eps), given, upstream)
    same = results(functools.partial(eager, eps=eps), given, upstream)
    truth = results(functools.partial(eager, eps=eps), wide, {name: grad.double() for name, grad in upstream.items()})
    for name, value in got.items():
        if truth[name] is None:
            assert value is None, name
            continue
        assert value.dtype == given["x"].dtype
        assert_close_to_fp64(value, same[name], truth[name], name)
    return got


@pytest.mark.parametrize("without", [(), ("update",), ("bias",), ("update", "bias")], ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@over_backends
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, device, backend, dtype, without):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(*size, dtype, device, without)
    # Of few columns some have almost no variance, and without an eps above it rounding would be all that is compared.
    got = compare(given, backend, eps=1e-5 if size[1] > 16 else 0.1)
    expected = given["x"] if "update" in without else given["x"] + given["update"]
    assert torch.equal(got["total"], expected)
    assert ("update" in without) == (got["total"] is given["x"])


@over_dtypes
@over_backends
@pytest.mark.parametrize("rows", [1, 5])
def test_one_column_is_its_own_mean(rows, device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(rows, 1, dtype, device)
    upstream = {name: torch.randn_like(given["x"]) for name in BOTH}
    got = results(ours(backend), given, upstream)
    expected = {
        "total": given["x"] + given["update"], "normed": given["bias"].expand(rows, 1),
        "gradient of x": upstream["total"], "gradient of update": upstream["total"],
        "gradient of weight": torch.zeros_like(given["weight"]), "gradient of bias": upstream["normed"].sum(0),
    }  # fmt: skip
    step = torch.finfo(dtype).eps
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=4 * step, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_more_rows_than_the_smallest_chunks_hold(device, backend, dtype):
    compare(make(2100, 20, dtype, device), backend)


@over_dtypes
@over_backends
@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced", "expanded rows", "expanded columns"])
def test_any_strides(layout, device, backend, dtype):
    """Of the inputs, and of what comes back to them."""
    skip_where_unsupported("residual_norm", device, backend, dtype)
    change = {
        "transposed": lambda x: x.T.contiguous().T,
        "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "sliced": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        "expanded rows": lambda x: x[:1].expand_as(x),
        "expanded columns": lambda x: (x[:, :1] + 0).expand_as(x),
    }[layout]
    given = {name: x.detach() for name, x in make(17, 33, dtype, device).items()}
    upstream = {name: change(torch.randn_like(given["x"])) for name in BOTH}
    given["update"] = change(given["update"])
    if layout != "expanded columns":  # where a row is constant there is nothing but rounding to compare
        given["x"] = change(given["x"])
    given["weight"], given["bias"] = (given[name].repeat_interleave(2)[::2] for name in ("weight", "bias"))
    compare({name: x.requires_grad_() for name, x in given.items()}, backend, upstream)


@over_dtypes
@over_backends
@pytest.mark.parametrize("without", [(), ("update",)], ids=" ".join)
@pytest.mark.parametrize("used", BOTH)
def test_one_result_alone(used, without, device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(9, 33, dtype, device, without)
    compare(given, backend, {used: torch.randn_like(given["x"])})


@over_backends
@pytest.mark.parametrize("used", BOTH)
def test_gradients_of_x_and_update_have_memory_of_their_own(used, device, backend):
    given = make(3, 8, device=device)
    dict(zip(BOTH, residual_norm(**given, backend=backend), strict=True))[used].square().sum().backward()
    assert torch.equal(given["x"].grad, given["update"].grad)
    assert given["x"].grad.data_ptr() != given["update"].grad.data_ptr()


@over_dtypes
@over_backends
def test_no_rows(device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(0, 8, dtype, device)
    got = results(ours(backend), given, {name: torch.zeros_like(given["x"]) for name in BOTH})
    for name, value in got.items():
        assert torch.equal(value, torch.zeros_like(value)), name
        assert value.shape == ((8,) if name.endswith(("weight", "bias")) else (0, 8))


@over_backends
def test_a_large_offset_does_not_drown_the_variance(device, backend):
    given = make(9, 257, device=device, without=["update"])
    given["x"] = (given["x"].detach() * 0.1 + 1e4).requires_grad_()
    compare(given, backend)


@over_dtypes
@over_backends
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_constant_rows(eps, device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(6, 64, dtype, device)
    with torch.no_grad():
        given["x"][::2], given["update"][::2] = 1.5, 0.25
    compare(given, backend, eps=eps)


@over_backends
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 3e4), (torch.float16, 1e-6), (torch.bfloat16, 1e17), (torch.bfloat16, 1e-30)],
)
def test_numbers_at_the_ends_of_half_precision(dtype, size, device, backend):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(6, 64, dtype, device)
    with torch.no_grad():
        for name in ("x", "update"):
            given[name].copy_(torch.rand(6, 64) * size)
    compare(given, backend)


@over_dtypes
@over_backends
@pytest.mark.parametrize("bad", [*strange_nans(), torch.tensor(torch.inf)], ids=["nan", "payload", "all bits", "inf"])
def test_nan_and_infinity_are_not_hidden(bad, device, backend, dtype):
    """Where fp64 has NaN there is NaN, and nowhere else."""
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(4, 33, dtype, device)
    with torch.no_grad():
        given["update"][2, 5] = bad
    compare(given, backend)
    given = make(4, 33, dtype, device)
    upstream = {name: torch.randn_like(given["x"]) for name in BOTH}
    upstream["normed"][1, 7] = torch.nan
    compare(given, backend, upstream)


@over_dtypes
@over_backends
@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    compare(make(33, 111, dtype, device), backend)


@over_dtypes
@pytest.mark.parametrize(("device", "backend"), KERNELS)
def test_repeats_bit_for_bit_on_any_number_of_threads(device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(40, 500, dtype, device)
    upstream = {name: torch.randn_like(given["x"]) for name in BOTH}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3, 4, 1):
            torch.set_num_threads(count)
            found.append(results(ours(backend), given, upstream).values())
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("frozen", [("x",), ("x", "update"), ("weight",), ("bias",), ("weight", "bias")], ids=" ".join)
def test_frozen_inputs_cost_nothing(frozen, device, backend, monkeypatch):
    module, asked = dispatch.implementation("residual_norm", device, backend), []
    original = module.backward
    monkeypatch.setattr(module, "backward", lambda **given: asked.append(list(given["needs"])) or original(**given))
    given = make(5, 8, device=device)
    for name in frozen:
        given[name].requires_grad_(False)
    used = BOTH if given["x"].requires_grad or given["update"].requires_grad else ("normed",)
    got = compare(given, backend, {name: torch.randn_like(given["x"]) for name in used})
    assert got["total"].requires_grad == (used == BOTH)
    assert asked == [[set(frozen) != {"x", "update"}, "weight" not in frozen, "bias" not in frozen]]


@pytest.mark.parametrize("without", [(), ("update",), ("bias",)], ids=" ".join)
def test_gradcheck(without):
    given = make(4, 5, torch.float64, without=without)
    names = [name for name in given if name not in without]

    def function(*tensors):
        return residual_norm(**given | dict(zip(names, tensors, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(function, [given[name] for name in names])


@over_dtypes
@over_backends
@pytest.mark.parametrize("without", [(), ("update", "bias")], ids=" ".join)
def test_opcheck(without, device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    inputs = make(5, 8, dtype, device, without).values()
    torch.library.opcheck(torch.ops.dph.residual_norm.default, (*inputs, 1e-5, backend))
    x, update, weight, bias = (None if x is None else x.detach() for x in inputs)
    total, _, moments = torch.ops.dph.residual_norm(x, update, weight, bias, 1e-5, backend)
    arguments = None if update is None else x.T.contiguous().T, x, x if update is None else total, weight, moments
    for needs in ([True] * 3, [True, False, False], [False, False, True]):
        torch.library.opcheck(torch.ops.dph.residual_norm_backward.default, (*arguments, needs, backend))


@over_backends
@pytest.mark.parametrize("used", [BOTH, ("total",), ("normed",)], ids=" ".join)
def test_the_way_through_the_dispatcher_gives_the_same_bits(used, device, backend, monkeypatch):
    given = make(5, 33, device=device)
    upstream = {name: torch.randn_like(given["x"]) for name in used}
    direct = results(ours(backend), given, upstream)
    monkeypatch.setattr(dispatch, "can_bypass_dispatcher", lambda tensors: False)
    for name, value in results(ours(backend), given, upstream).items():
        assert value is direct[name] is None or torch.equal(value, direct[name])


@pytest.mark.parametrize(("device", "backend"), [*BACKENDS, ("cpu", "auto")])
@pytest.mark.parametrize("without", [(), ("update",)], ids=" ".join)
def test_compiles_as_one_graph(without, device, backend):
    """Left to itself as plain PyTorch, which the compiler fuses; a backend that is asked for stays."""
    torch.compiler.reset()
    given, graphs = make(5, 8, device=device, without=without), []
    upstream = {name: torch.randn_like(given["x"]) for name in BOTH}

    def function(x, update, weight, bias):
        total, normed = residual_norm(x.tanh(), update, weight, bias, backend=backend)
        return total * 2, normed.tanh()

    def keep(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    expected = results(function, given, upstream)
    torch.testing.assert_close(
        results(torch.compile(function, fullgraph=True, backend=keep), given, upstream), expected
    )
    assert ["dph.residual_norm" in graph for graph in graphs] == [backend != "auto"]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, given, upstream), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_by_pytorchs_rules(device, monkeypatch):
    """On a GPU the stream and its norm stay in fp32, though what is added is not."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    given = make(5, 64, device=device)
    given["update"] = given["update"].detach().bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        for got, expected in zip(residual_norm(**given), eager(**given), strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


def test_rows_that_no_program_holds(monkeypatch):
    monkeypatch.setattr(dispatch, "call", None)
    given = make(8, 16385)
    assert given["x"].numel() > dispatch.SMALL_ELEMENTS
    torch.testing.assert_close(residual_norm(**given), eager(**given))


@over_backends
def test_an_upstream_gradient_whose_sign_is_put_off(device, backend):
    given = make(5, 33, device=device)
    compare(given, backend, {name: torch._neg_view(torch.randn(5, 33, device=device)) for name in BOTH})


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_all_it_is_given(compiled):
    """To one dtype, with wide arithmetic inside: equal to the same call on inputs cast by hand."""
    given = make(5, 64)

    def function(**given):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return residual_norm(**given, backend="reference")

    upstream = {name: torch.randn(5, 64).bfloat16() for name in BOTH}
    function = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    narrow = {name: x.detach().bfloat16().requires_grad_() for name, x in given.items()}
    expected = results(ours("reference"), narrow, upstream)
    for name, value in results(function, given, upstream).items():
        assert value.dtype == (torch.float32 if name.startswith("gradient") else torch.bfloat16)
        torch.testing.assert_close(value.bfloat16(), expected[name], rtol=2e-2, atol=2e-2)


@over_backends
@pytest.mark.usefixtures("overflow_is_an_error")
def test_rows_that_lie_further_apart_than_int32_counts(device, backend):
    """Elements 0, 2**30 and 2**31 of a tensor of which only these pages are touched."""
    dtype = torch.bfloat16 if backend == "cpu" else torch.float16
    storage = torch.empty(2**31 + 64, dtype=dtype, device=device)
    far = [storage.as_strided((3, 16), (2**30, 1), 16 * i).copy_(torch.randn(3, 16)) for i in range(4)]
    given, found = make(3, 16, dtype, device), []
    for x, update, *grads in (far, [value.clone(memory_format=torch.contiguous_format) for value in far]):
        inputs = given | {"x": x.detach().requires_grad_(), "update": update.detach().requires_grad_()}
        found.append(results(ours(backend), inputs, dict(zip(BOTH, grads, strict=True))).values())
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("device", "backend"), [p for p in BACKENDS if p.values[1] == "triton"])
def test_rows_that_do_not_fit_into_registers_are_refused(device, backend):
    with pytest.raises(RuntimeError, match="backend 'triton' takes rows of up to 16384 elements, got 16385"):
        residual_norm(**make(1, 16385, device=device), backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(5)}, r"x: expected shape \[T, C\], got \[5\]"),
        ({"x": torch.zeros(5, 8, dtype=torch.int64)}, "x: expected float16 or .*float64, got int64"),
        ({"x": torch.zeros(5, 0)}, r"x: expected at least one column \(C >= 1\), got shape \[5, 0\]"),
        ({"update": torch.zeros(4, 8)}, r"update: expected shape \[5, 8\], got \[4, 8\]"),
        ({"update": torch.zeros(5, 8).half()}, "update: expected float32, got float16"),
        ({"weight": None}, "weight: expected a tensor, got NoneType"),
        ({"weight": torch.zeros(7)}, r"weight: expected shape \[8\], got \[7\]"),
        ({"weight": torch.zeros(8, device="meta")}, "weight: expected a tensor on cpu, got one on meta"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, "bias: expected float32, got float64"),
        ({"eps": -1.0}, "eps: expected 0.0 <= eps <= inf, got -1.0"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        residual_norm(**make(5, 8) | change)
