"""residual_norm: every backend against plain PyTorch in the same precision and in fp64."""

import functools

import pytest
import torch
from helpers.numerics import assert_close_to_fp64, implementations, skip_where_unsupported, strange_nans
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dph_kernels import dispatch, native, residual_norm

SIZES = [(2, 3), (63, 64), (65, 111), (257, 2), (5, 1536), (5, 3, 64)]
KINDS = ("layer", "rms")
BACKENDS = implementations("residual_norm")
KERNELS = [p for p in BACKENDS if p.values[1] != "reference"]
NATIVE = [p for p in BACKENDS if p.values[1] == "cpu"]
BOTH = ("total", "normed")
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
over_backends = pytest.mark.parametrize(("device", "backend"), BACKENDS)


def make(*size, dtype=torch.float32, device="cpu", without=(), kind="layer"):
    """The tensors by name, None for those in ``without``, and the kind."""
    sizes = {"x": size, "update": size, "weight": size[-1:], "bias": size[-1:]}
    without = (*without, "bias") if kind == "rms" else without
    return {
        name: None if name in without else torch.randn(size, device=device).to(dtype).requires_grad_()
        for name, size in sizes.items()
    } | {"kind": kind}


def eager(x, update, weight, bias, kind="layer", eps=1e-5):
    total = x if update is None else x + update
    if kind == "rms":
        return total, torch.nn.functional.rms_norm(total, x.shape[-1:], weight, eps)
    return total, torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps)


def changed(given, change):
    """The same arguments with ``change`` applied to each tensor."""
    return {name: change(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}


def leaf(dtype):
    return lambda x: x.detach().to(dtype).requires_grad_()


def results(function, given, upstream):
    """Both results and all gradients by name, of the outputs for which there is an upstream gradient."""
    outputs = dict(zip(BOTH, function(**given), strict=True))
    wanted = {name: x for name, x in given.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    used = [outputs[name] for name in upstream]
    found = torch.autograd.grad(used, tuple(wanted.values()), tuple(upstream.values()), allow_unused=True)
    return outputs | {f"gradient of {name}": grad for name, grad in zip(wanted, found, strict=True)}


def ours(backend, **options):
    return functools.partial(residual_norm, backend=backend, **options)


def compare(given, backend, upstream=None, eps=1e-5):
    """Results and gradients of an operator call against eager PyTorch; returns the operator's."""
    if upstream is None:
        upstream = {name: torch.randn_like(given["x"]) for name in BOTH}
    wide = changed(given, leaf(torch.float64))
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


@pytest.mark.parametrize(("kind", "without"), [("layer", ()), ("layer", ("bias",)), ("rms", ("bias",))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@over_backends
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, device, backend, dtype, kind, without):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    # Of few columns some have almost no variance, and without an eps above it rounding would be all that is compared.
    eps = 1e-5 if size[-1] > 16 else 0.1
    for more in ((), ("update",)):
        given = make(*size, dtype=dtype, device=device, without=without + more, kind=kind)
        got = compare(given, backend, eps=eps)
        expected = given["x"] if more else given["x"] + given["update"]
        assert torch.equal(got["total"], expected)
        assert bool(more) == (got["total"] is given["x"])


@over_dtypes
@over_backends
def test_short_rows(device, backend, dtype):
    """Several in a program or in a call, as many as fill it and some more, some fewer."""
    skip_where_unsupported("residual_norm", device, backend, dtype)
    for size in ((5, 1), (3, 2, 1), (1, 1, 7), (33, 5, 100), (4, 8, 128)):
        compare(make(*size, dtype=dtype, device=device, kind="rms"), backend, eps=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("device", "backend"), NATIVE)
@pytest.mark.parametrize("lanes", [4, 8])
def test_narrower_vectors(lanes, device, backend, dtype):
    """What a processor without AVX-512, or without AVX2, runs."""
    if native.module().residual_norm_lanes(lanes) != lanes:
        pytest.skip(f"this processor has no vectors of {lanes} floats")
    try:
        for kind in KINDS:
            for without in ((), ("update",), ("bias",)):
                compare(make(19, 111, dtype=dtype, without=without, kind=kind), backend)
    finally:
        native.module().residual_norm_lanes(16)


@over_backends
def test_equals_the_modules_of_pytorch_and_transformers(device, backend):
    for size in ((9, 111), (5, 3, 64)):
        given = make(*size, device=device, without=["update"], kind="rms")
        for module in (torch.nn.RMSNorm(size[-1], eps=1e-6), LlamaRMSNorm(size[-1], eps=1e-6)):
            module.weight = torch.nn.Parameter(given["weight"].detach())
            expected, upstream = module(given["x"]), torch.randn_like(given["x"])
            got = results(ours(backend, eps=1e-6), given, {"normed": upstream})
            torch.testing.assert_close(got["normed"], expected)
            for name, input in (("x", given["x"]), ("weight", module.weight)):
                (grad,) = torch.autograd.grad(expected, input, upstream, retain_graph=True)
                torch.testing.assert_close(got[f"gradient of {name}"], grad, rtol=1e-5, atol=1e-5)


@over_dtypes
@over_backends
@pytest.mark.parametrize("rows", [1, 5])
def test_one_column_is_its_own_mean(rows, device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    given = make(rows, 1, dtype=dtype, device=device)
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
    compare(make(2100, 20, dtype=dtype, device=device), backend)
    compare(make(700, 3, 20, dtype=dtype, device=device, kind="rms"), backend)


@over_dtypes
@over_backends
@pytest.mark.parametrize(
    "layout", ["transposed", "strided", "sliced", "expanded rows", "expanded columns", "joint projection"]
)
def test_any_strides(layout, device, backend, dtype):
    """Of the inputs, and of what comes back to them."""
    skip_where_unsupported("residual_norm", device, backend, dtype)
    change = {
        "transposed": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "expanded rows": lambda x: x[:1].expand_as(x),
        "expanded columns": lambda x: (x[..., :1] + 0).expand_as(x),
        "joint projection": lambda x: torch.cat([x, x], -2)[..., x.shape[-2] :, :],
    }[layout]
    for kind, size in (("layer", (17, 33)), ("rms", (17, 33)), ("rms", (5, 4, 33))):
        given = changed(make(*size, dtype=dtype, device=device, kind=kind), torch.Tensor.detach)
        upstream = {name: change(torch.randn_like(given["x"])) for name in BOTH}
        given["update"] = change(given["update"])
        if layout != "expanded columns":  # where a row is constant there is nothing but rounding to compare
            given["x"] = change(given["x"])
        given["weight"] = given["weight"].repeat_interleave(2)[::2]
        if kind == "layer":
            given["bias"] = given["bias"].repeat_interleave(2)[::2]
        compare(changed(given, torch.Tensor.requires_grad_), backend, upstream)


@over_dtypes
@over_backends
@pytest.mark.parametrize("without", [(), ("update",)], ids=" ".join)
@pytest.mark.parametrize("used", BOTH)
def test_one_result_alone(used, without, device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    for kind in KINDS:
        given = make(9, 33, dtype=dtype, device=device, without=without, kind=kind)
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
    for kind, size in (("layer", (0, 8)), ("rms", (0, 8)), ("rms", (0, 3, 8)), ("rms", (4, 0, 8))):
        given = make(*size, dtype=dtype, device=device, kind=kind)
        got = results(ours(backend), given, {name: torch.zeros_like(given["x"]) for name in BOTH})
        for name, value in got.items():
            assert torch.equal(value, torch.zeros_like(value)), name
            assert value.shape == ((8,) if name.endswith(("weight", "bias")) else size)


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
    for kind in KINDS:
        given = make(6, 64, dtype=dtype, device=device, kind=kind)
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
    for kind in KINDS:
        given = make(6, 64, dtype=dtype, device=device, kind=kind)
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
    for kind in KINDS:
        given = make(4, 33, dtype=dtype, device=device, kind=kind)
        with torch.no_grad():
            given["update"][2, 5] = bad
        compare(given, backend)
        given = make(4, 33, dtype=dtype, device=device, kind=kind)
        upstream = {name: torch.randn_like(given["x"]) for name in BOTH}
        upstream["normed"][1, 7] = torch.nan
        compare(given, backend, upstream)


@over_dtypes
@over_backends
@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    compare(make(33, 111, dtype=dtype, device=device), backend)
    compare(make(11, 3, 111, dtype=dtype, device=device, kind="rms"), backend)


@over_dtypes
@pytest.mark.parametrize(("device", "backend"), KERNELS)
def test_repeats_bit_for_bit_on_any_number_of_threads(device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    threads = torch.get_num_threads()
    for kind, size in (("layer", (40, 500)), ("rms", (40, 500)), ("rms", (100, 4, 100))):
        given, found = make(*size, dtype=dtype, device=device, kind=kind), []
        upstream = {name: torch.randn_like(given["x"]) for name in BOTH}
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
    for kind in KINDS:
        given = make(5, 8, device=device, kind=kind)
        for name in set(frozen) - {"bias"} if kind == "rms" else frozen:
            given[name].requires_grad_(False)
        used = BOTH if given["x"].requires_grad or given["update"].requires_grad else ("normed",)
        got = compare(given, backend, {name: torch.randn_like(given["x"]) for name in used})
        assert got["total"].requires_grad == (used == BOTH)
        needs_bias = kind == "layer" and "bias" not in frozen
        assert asked.pop() == [set(frozen) != {"x", "update"}, "weight" not in frozen, needs_bias]
        assert not asked


@pytest.mark.parametrize("without", [(), ("update",), ("bias",)], ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, without):
    given = make(4, 5, dtype=torch.float64, without=without, kind=kind)
    names = [name for name, x in given.items() if isinstance(x, torch.Tensor)]

    def function(*tensors):
        return residual_norm(**given | dict(zip(names, tensors, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(function, [given[name] for name in names])


@over_dtypes
@over_backends
@pytest.mark.parametrize("without", [(), ("update", "bias")], ids=" ".join)
def test_opcheck(without, device, backend, dtype):
    skip_where_unsupported("residual_norm", device, backend, dtype)
    for kind, size in (("layer", (5, 8)), ("rms", (5, 8)), ("rms", (5, 3, 8))):
        *inputs, kind = make(*size, dtype=dtype, device=device, without=without, kind=kind).values()
        torch.library.opcheck(torch.ops.dph.residual_norm.default, (*inputs, 1e-5, kind, backend))
        x, update, weight, bias = (None if x is None else x.detach() for x in inputs)
        total, _, moments = torch.ops.dph.residual_norm(x, update, weight, bias, 1e-5, kind, backend)
        d_total = None if update is None else x.movedim(-1, 0).contiguous().movedim(0, -1)
        arguments = d_total, x, x if update is None else total, weight, moments
        for needs in ([True, True, kind == "layer"], [True, False, False], [False, kind == "rms", kind == "layer"]):
            torch.library.opcheck(torch.ops.dph.residual_norm_backward.default, (*arguments, needs, backend))


@over_backends
@pytest.mark.parametrize("used", [BOTH, ("total",), ("normed",)], ids=" ".join)
def test_the_way_through_the_dispatcher_gives_the_same_bits(used, device, backend, monkeypatch):
    for kind, size in (("layer", (5, 33)), ("rms", (5, 3, 33))):
        given = make(*size, device=device, kind=kind)
        upstream = {name: torch.randn_like(given["x"]) for name in used}
        direct = results(ours(backend), given, upstream)
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "can_bypass_dispatcher", lambda tensors: False)
            dispatched = results(ours(backend), given, upstream)
        for name, value in dispatched.items():
            assert value is direct[name] is None or torch.equal(value, direct[name])


@pytest.mark.parametrize(("device", "backend"), [*BACKENDS, ("cpu", "auto")])
@pytest.mark.parametrize(("kind", "size", "without"), [
    ("layer", (5, 8), ()), ("layer", (5, 8), ("update",)), ("rms", (5, 8), ()), ("rms", (5, 3, 8), ("update",)),
])  # fmt: skip
def test_compiles_as_one_graph(kind, size, without, device, backend):
    """Left to itself as plain PyTorch, which the compiler fuses; a backend that is asked for stays."""
    torch.compiler.reset()
    given, graphs = make(*size, device=device, without=without, kind=kind), []
    upstream = {name: torch.randn_like(given["x"]) for name in BOTH}

    def function(x, update, weight, bias, kind):
        total, normed = residual_norm(x.tanh(), update, weight, bias, kind=kind, backend=backend)
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
    for kind in KINDS:
        given = make(5, 64, device=device, kind=kind)
        given["update"] = given["update"].detach().bfloat16()
        with torch.autocast(device, dtype=torch.bfloat16):
            for got, expected in zip(residual_norm(**given), eager(**given), strict=True):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected)


def test_rows_that_no_program_holds(monkeypatch):
    monkeypatch.setattr(dispatch, "call", None)
    for kind in KINDS:
        given = make(8, 16385, kind=kind)
        assert given["x"].numel() > dispatch.SMALL_ELEMENTS
        torch.testing.assert_close(residual_norm(**given), eager(**given))


@over_backends
def test_an_upstream_gradient_whose_sign_is_put_off(device, backend):
    given = make(5, 33, device=device)
    compare(given, backend, {name: torch._neg_view(torch.randn(5, 33, device=device)) for name in BOTH})


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_all_it_is_given(compiled):
    """To one dtype, with wide arithmetic inside: equal to the same call on inputs cast by hand."""

    def function(**given):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return residual_norm(**given, backend="reference")

    tested = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    for kind in KINDS:
        given = make(5, 64, kind=kind)
        upstream = {name: torch.randn(5, 64).bfloat16() for name in BOTH}
        expected = results(ours("reference"), changed(given, leaf(torch.bfloat16)), upstream)
        for name, value in results(tested, given, upstream).items():
            assert value.dtype == (torch.float32 if name.startswith("gradient") else torch.bfloat16)
            torch.testing.assert_close(value.bfloat16(), expected[name], rtol=2e-2, atol=2e-2)


@over_backends
@pytest.mark.usefixtures("overflow_is_an_error")
def test_rows_that_lie_further_apart_than_int32_counts(device, backend):
    """Elements 0, 2**30 and 2**31 of a tensor of which only these pages are touched: of tokens, and of heads."""
    dtype = torch.bfloat16 if backend == "cpu" else torch.float16
    storage = torch.empty(2**31 + 64, dtype=dtype, device=device)
    for kind, size, strides in (("layer", (3, 16), (2**30, 1)), ("rms", (1, 3, 16), (16, 2**30, 1))):
        far = [storage.as_strided(size, strides, 16 * i).copy_(torch.randn(size)) for i in range(4)]
        given, found = make(*size, dtype=dtype, device=device, kind=kind), []
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
        ({"x": torch.zeros(5)}, r"x: expected shape \[T, C\] or \[T, H, C\], got \[5\]"),
        ({"x": torch.zeros(2, 2, 5, 8)}, r"x: expected shape \[T, C\] or \[T, H, C\], got \[2, 2, 5, 8\]"),
        ({"x": torch.zeros(5, 8, dtype=torch.int64)}, "x: expected float16 or .*float64, got int64"),
        ({"x": torch.zeros(5, 0)}, r"x: expected at least one column \(C >= 1\), got shape \[5, 0\]"),
        ({"update": torch.zeros(4, 8)}, r"update: expected shape \[5, 8\], got \[4, 8\]"),
        ({"update": torch.zeros(5, 1, 8)}, r"update: expected shape \[5, 8\], got \[5, 1, 8\]"),
        ({"update": torch.zeros(5, 8).half()}, "update: expected float32, got float16"),
        ({"weight": None}, "weight: expected a tensor, got NoneType"),
        ({"weight": torch.zeros(7)}, r"weight: expected shape \[8\], got \[7\]"),
        ({"weight": torch.zeros(8, device="meta")}, "weight: expected a tensor on cpu, got one on meta"),
        ({"bias": torch.zeros(8, dtype=torch.float64)}, "bias: expected float32, got float64"),
        ({"kind": "batch"}, "kind: expected one of 'layer', 'rms', got 'batch'"),
        ({"kind": "rms"}, "bias: expected None with kind 'rms', got a Tensor"),
        ({"eps": -1.0}, "eps: expected 0.0 <= eps <= inf, got -1.0"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        residual_norm(**make(5, 8) | change)
