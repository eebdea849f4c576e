"""Usual calls, which C++ checks and computes: the bits of the general way."""

import pytest
import torch

from dph_kernels import dispatch, linear_logprob, native, residual_norm, swiglu
from tests.kernels.test_tensors import FREED, OTHER, READABLE

pytestmark = pytest.mark.skipif(bool(native.missing("cpu")), reason=str(native.missing("cpu")))


def drawn(*size, dtype=torch.float32):
    return torch.randn(size).to(dtype)


def norm(rows, columns, kind, *, update=True, heads=0, dtype=torch.float32):
    size = (rows, heads, columns) if heads else (rows, columns)
    bias = drawn(columns, dtype=dtype) if kind == "layer" else None
    return [
        drawn(*size, dtype=dtype),
        drawn(*size, dtype=dtype) if update else None,
        drawn(columns, dtype=dtype),
        bias,
    ], {"kind": kind}


def gate(rows, columns, *, bias=True, dtype=torch.float32):
    return [drawn(rows, 2 * columns, dtype=dtype), drawn(2 * columns, dtype=dtype) if bias else None], {}


HALF = torch.bfloat16
CALLS = {
    "layer": (residual_norm, lambda rows: norm(rows, 48, "layer")),
    "layer without update": (residual_norm, lambda rows: norm(rows, 33, "layer", update=False)),
    "rms": (residual_norm, lambda rows: norm(rows, 48, "rms")),
    "rms of heads": (residual_norm, lambda rows: norm(rows, 16, "rms", update=False, heads=3)),
    "layer of heads": (residual_norm, lambda rows: norm(rows, 16, "layer", heads=3)),
    "layer in bf16": (residual_norm, lambda rows: norm(rows, 48, "layer", dtype=HALF)),
    "swiglu": (swiglu, lambda rows: gate(rows, 40)),
    "swiglu without bias": (swiglu, lambda rows: gate(rows, 17, bias=False)),
    "swiglu in bf16": (swiglu, lambda rows: gate(rows, 40, bias=False, dtype=HALF)),
}
EACH = pytest.mark.parametrize("call", CALLS)


@pytest.fixture(params=[0, 2**17])
def few(request, monkeypatch):
    """The elements up to which PyTorch computes a LayerNorm."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", request.param)


def results(operator, given, options, backend="auto"):
    found = operator(*given, **options, backend=backend)
    return [found] if isinstance(found, torch.Tensor) else list(found)


@pytest.fixture
def only_usual(monkeypatch):
    """The general way, which ends in ``dispatch.call``, is an error."""

    def fail(*_):
        raise AssertionError("not a usual call")

    monkeypatch.setattr(dispatch, "call", fail)
    monkeypatch.setattr(dispatch, "prefer_pytorch", fail)


@EACH
@pytest.mark.parametrize("rows", [1, 2, 63, 700])
@pytest.mark.usefixtures("poisoned_empty")
def test_the_bits_of_the_general_way(call, rows, request, monkeypatch):
    """With and without gradients, at every number of rows, whose results do not depend on the other rows."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    operator, make = CALLS[call]
    given, options = make(rows)
    expected = results(operator, given, options, "cpu")
    with dispatch.batch_invariant():
        assert all(map(torch.equal, results(operator, given, options), expected))
    leaves = [None if x is None else x.clone().requires_grad_() for x in given]
    with_gradients = results(operator, leaves, options)
    few = [x[:1] if x is not None and x.shape[0] == rows and x.ndim > 1 else x for x in given]
    request.getfixturevalue("only_usual")
    got = results(operator, given, options)
    for a, b, wanted in zip(got, with_gradients, expected, strict=True):
        assert a.dtype == wanted.dtype
        assert a.is_contiguous() or a is given[0]
        assert torch.equal(a, wanted)
        assert torch.equal(b, wanted)
    for a, wanted in zip(results(operator, few, options), expected, strict=True):
        assert torch.equal(a, wanted[:1])


@EACH
@pytest.mark.usefixtures("few", "only_usual")
def test_rows_of_any_strides(call):
    """A slice of a wider tensor is read in place, and its results are contiguous."""
    operator, make = CALLS[call]
    given, options = make(5)
    wide = [x if x is None or x.ndim < 2 else torch.cat([x, x], -1)[..., : x.shape[-1]] for x in given]
    for a, b in zip(results(operator, wide, options), results(operator, given, options), strict=True):
        assert torch.equal(a, b)


@EACH
@pytest.mark.usefixtures("few", "only_usual")
def test_parameters_without_gradients(call):
    operator, make = CALLS[call]
    given, options = make(3)
    expected = results(operator, given, options)
    given = [None if x is None else torch.nn.Parameter(x) for x in given]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = results(operator, given, options)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
            assert a is given[0] or not a.requires_grad


@pytest.mark.parametrize("call", [call for call in CALLS if call.startswith("layer")])
def test_few_elements_of_a_layer_norm(call):
    """The bits of PyTorch's own operations for every caller: with gradients, in a profile, or in forward mode."""
    operator, make = CALLS[call]
    x, update, weight, bias = make(3)[0]
    total = x if update is None else x + update
    expected = torch.nn.functional.layer_norm(total, total.shape[-1:], weight, bias, 1e-5)
    assert torch.equal(operator(x, update, weight, bias)[1], expected)
    with torch.profiler.profile():
        assert torch.equal(operator(x, update, weight, bias)[1], expected)
    got = operator(x, update, weight.clone().requires_grad_(), bias)[1]
    assert torch.equal(got, expected)
    assert got.grad_fn.name() == "NativeLayerNormBackward0"
    with torch.autograd.forward_ad.dual_level():
        assert native.module().residual_norm(x, update, weight, bias, 1e-5, "layer", 2**17) is None


def usual(operator, given, options):
    """The result of C++ itself, by kernels."""
    if operator is swiglu:
        return native.module().swiglu(*given)
    return native.module().residual_norm(*given, options.get("eps", 1e-5), options["kind"], 0)


@EACH
def test_gradients_are_not_forgotten(call):
    operator, make = CALLS[call]
    given, options = make(3)
    for i, x in enumerate(given):
        if x is not None:
            leaves = list(given)
            leaves[i] = x.clone().requires_grad_()
            assert usual(operator, leaves, options) is (True if operator is swiglu else None)
            assert all(y.requires_grad or y is given[0] for y in results(operator, leaves, options)[-1:])
            with torch.no_grad():
                assert not any(usual(operator, leaves, options) is other for other in (True, None))


@EACH
@pytest.mark.parametrize("kind", [*READABLE, *FREED, *OTHER])
def test_tensors_that_are_left_to_the_general_way(call, kind):
    operator, make = CALLS[call]
    given, options = make(4)
    if given[0].dtype == HALF and kind in ("quantised", "mkldnn"):
        pytest.skip(f"no bf16 tensor is {kind}")
    for i, x in enumerate(given):
        if x is not None:
            changed = list(given)
            changed[i] = {**READABLE, **FREED, **OTHER}[kind](x)
            with torch.no_grad():
                got = usual(operator, changed, options)
            assert (got is not None) == (kind == "parameter")


def modes():
    from torch.utils._python_dispatch import TorchDispatchMode

    return {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "profile": torch.profiler.profile,
        "forward mode": torch.autograd.forward_ad.dual_level,
        "dispatch mode": TorchDispatchMode,
    }


@EACH
@pytest.mark.parametrize("mode", modes())
def test_modes_that_are_left_to_the_general_way(call, mode):
    operator, make = CALLS[call]
    given, options = make(4)
    assert usual(operator, given, options) is not None
    with modes()[mode]():
        assert usual(operator, given, options) is None


def test_transforms_are_left_to_the_general_way():
    given, found = gate(4, 8)[0], []

    def function(bias):
        found.append(native.module().swiglu(given[0], given[1]))
        return bias

    torch.vmap(function)(torch.randn(2, 16))
    torch.jit.trace(function, given[1], check_trace=False)
    assert found == [None] * len(found)
    assert len(found) >= 2


MISFITS = {
    "double": lambda given: [None if x is None else x.double() for x in given],
    "half": lambda given: [None if x is None else x.half() for x in given],
    "two dtypes": lambda given: [given[0].double(), *given[1:]],
    "no rows": lambda given: [None if x is None else x[:0] if x.ndim > 1 else x for x in given],
    "one dimension": lambda given: [given[0].flatten(), *given[1:]],
    "other width": lambda given: [given[0][..., :-1], *given[1:]],
    "columns apart": lambda given: [torch.stack([given[0]] * 2, -1)[..., 0], *given[1:]],
    "not a tensor": lambda given: [given[0].tolist(), *given[1:]],
}


@EACH
@pytest.mark.parametrize("change", MISFITS)
def test_what_does_not_fit(call, change):
    operator, make = CALLS[call]
    given, options = make(4)
    if change == "two dtypes" and sum(x is not None for x in given) == 1:
        given = given[:1]
        change = "double"
    given = [*MISFITS[change](given), None][: len(make(4)[0])]
    assert usual(operator, given, options) is None


@pytest.mark.parametrize("changed", [{"eps": -1.0}, {"eps": float("nan")}, {"eps": 1}, {"kind": "batch"}, {"kind": 1}])
def test_options_that_do_not_fit(changed):
    given, options = norm(4, 8, "layer")
    assert usual(residual_norm, given, options) is not None
    assert usual(residual_norm, given, options | changed) is None


def test_rows_that_auto_leaves_to_pytorch():
    for columns, fits in ((16384, True), (16385, False)):
        given, options = norm(1, columns, "layer")
        assert (usual(residual_norm, given, options) is not None) == fits


@pytest.mark.parametrize("operator", ["residual_norm", "swiglu"])
def test_other_backends_have_none(operator, monkeypatch):
    assert dispatch.usual_call.__wrapped__(operator)
    monkeypatch.setattr(dispatch, "implementation", lambda *_: torch)
    assert dispatch.usual_call.__wrapped__(operator) is None


# linear_logprob


def logits():
    return drawn(5, 24), drawn(70, 24), torch.randint(70, (5,))


@pytest.mark.parametrize("few", [True, False])
def test_few_logits_are_pytorch_s(few, monkeypatch):
    """The same bits with and without gradients, row weights and a profile; more logits are the kernel's."""
    hidden, weight, targets = logits()
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 22 if few else 21)  # 350 logits, the limit is 352 or 336
    called = []
    monkeypatch.setattr(dispatch, "call", lambda *arguments, run=dispatch.call: called.append(1) or run(*arguments))
    plain = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = linear_logprob(hidden, weight, targets)
    torch.testing.assert_close(expected, plain)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    found = linear_logprob(*leaves, targets, row_weights=torch.rand(5), uniform=True)
    with torch.profiler.profile():
        assert torch.equal(linear_logprob(hidden, weight, targets), expected)
    torch.testing.assert_close(linear_logprob(hidden.T.contiguous().T, weight, targets), expected)
    assert not called or not few
    if few:
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match=r"targets: expected values in \[0, 70\), got 70"):
            linear_logprob(hidden, weight, targets.fill_(70))
        with dispatch.batch_invariant():
            linear_logprob(hidden, weight, targets.fill_(0))
        linear_logprob(hidden, weight, targets, backend="cpu")
        assert called


def test_misfits_of_log_probabilities():
    hidden, weight, targets = logits()
    fits = native.module().linear_logprob_fits
    assert fits(hidden, weight, targets)
    misfits = [
        (hidden.double(), weight.double(), targets),
        (hidden.bfloat16(), weight, targets),
        (hidden[:, :-1], weight, targets),
        (hidden[0], weight, targets),
        (hidden[:0], weight, targets[:0]),
        (hidden, weight[:0], targets),
        (hidden, weight, targets[1:]),
        (hidden, weight, targets.int()),
        (hidden, weight, targets + 70),
        (hidden, weight, targets - 70),
        (hidden, weight, targets.tolist()),
    ]
    for given in misfits:
        assert not fits(*given)
    for make in (READABLE["negated lazily"], READABLE["subclass"], *FREED.values()):
        assert not fits(make(hidden), weight, targets)
        assert not fits(hidden, make(weight), targets)
    for mode in modes().values():
        with mode():
            assert not fits(hidden, weight, targets)
