"""Which backend runs and why: `auto` says what it passed over, a backend asked for by name runs or raises."""

import importlib
import importlib.util

import pytest
import torch

from dph_kernels import dispatch, linear_logprob, native, residual_norm, swiglu

TABLE = {
    "cpu": {"cpu": "fast", "reference": "slow"},
    "cuda": {"cuda": "fastest", "triton": "fast", "reference": "slow"},
}


@pytest.fixture
def operator(monkeypatch):
    """An operator "made_up" with every backend in the table; answers are not cached from one test to the next."""
    monkeypatch.setitem(dispatch.AUTO, "made_up", TABLE)
    for cached in (dispatch.choose, dispatch.missing):
        cached.cache_clear()
    yield "made_up"
    for cached in (dispatch.choose, dispatch.missing):
        cached.cache_clear()


def lacking(monkeypatch, **reasons):
    """Let the native module lack what ``reasons`` says, and have the rest."""
    monkeypatch.setattr(native, "missing", reasons.get)


def test_auto_takes_the_first_of_the_line(operator, monkeypatch):
    lacking(monkeypatch)
    assert dispatch.choose(operator, "cpu") == dispatch.Choice("cpu", "fast")
    assert dispatch.choose(operator, "cuda") == dispatch.Choice("cuda", "fastest")


def test_auto_says_what_it_passed_over(operator, monkeypatch):
    lacking(monkeypatch, cpu="no compiler", cuda="no nvcc")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dispatch.choose(operator, "cpu") == dispatch.Choice("reference", "not cpu: no compiler; slow")
    reason = "not cuda: no nvcc; not triton: triton is not installed: pip install triton; slow"
    assert dispatch.choose(operator, "cuda") == dispatch.Choice("reference", reason)


def test_auto_raises_where_nothing_runs(operator, monkeypatch):
    lacking(monkeypatch, cpu="no compiler")
    monkeypatch.setitem(dispatch.AUTO, operator, {"cpu": {"cpu": "fast"}})
    with pytest.raises(RuntimeError, match=r"^made_up: no backend can run on cpu: not cpu: no compiler$"):
        dispatch.choose(operator, "cpu")


def test_a_named_backend_is_taken(operator, monkeypatch):
    lacking(monkeypatch)
    assert dispatch.choose(operator, "cpu", "reference") == dispatch.Choice("reference", "requested by name")
    assert dispatch.choose(operator, "cpu", "cpu").backend == "cpu"


@pytest.mark.parametrize(
    ("device", "backend", "reason"),
    [
        ("cpu", "cuda", "the cuda kernel works on CUDA tensors, and these are on cpu"),
        ("cpu", "triton", "the triton kernel works on CUDA tensors, and these are on cpu"),
        ("cuda", "cpu", "the C\\+\\+ kernel works on CPU tensors, and these are on cuda"),
        ("cuda", "cuda", "no nvcc"),
    ],
)
def test_a_named_backend_that_cannot_run_raises_with_the_reason(operator, device, backend, reason, monkeypatch):
    lacking(monkeypatch, cuda="no nvcc")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=f"^made_up: backend '{backend}' cannot run: {reason}$"):
        dispatch.choose(operator, device, backend)


def test_a_backend_without_code_raises(operator, monkeypatch):
    monkeypatch.setitem(dispatch.AUTO, operator, {"cpu": {"reference": "slow"}})
    with pytest.raises(RuntimeError, match="made_up has no 'triton' backend yet, only reference"):
        dispatch.choose(operator, "cpu", "triton")


@pytest.mark.parametrize("backend", ["flash", "sdpa"])
@pytest.mark.parametrize("operator", [name for name in dispatch.AUTO if name != "rope_attention"])
def test_other_projects_kernels_are_known_by_name_and_not_there_yet(operator, backend):
    message = f"{operator}: backend '{backend}' cannot run: {operator} has no '{backend}' backend yet, only .*reference"
    with pytest.raises(RuntimeError, match=message):
        dispatch.choose(operator, "cpu", backend)


def test_an_unknown_backend_is_an_error(operator):
    with pytest.raises(ValueError, match=r"^backend: expected 'auto' or one of .*reference.*, got 'fast'$"):
        dispatch.choose(operator, "cpu", "fast")


def test_an_unknown_device_is_an_error(operator):
    with pytest.raises(ValueError, match="made_up: expected tensors on cpu or cuda, got meta"):
        dispatch.choose(operator, "meta")


@pytest.mark.parametrize("operator", dispatch.AUTO)
def test_every_entry_of_the_table_has_its_code(operator):
    """The module is there with a forward and a backward pass; laprop, which works in place, has no backward."""
    for backend in dispatch.implemented(operator):
        spec = importlib.util.find_spec(f"dph_kernels.{operator}.{dispatch.MODULES[backend]}")
        assert spec is not None, f"{operator}: no file for {backend}"
    reference = dispatch.implementation(operator, "cpu", "reference")
    assert callable(reference.forward)
    assert operator == "laprop" or callable(reference.backward)


@pytest.mark.parametrize("operator", dispatch.AUTO)
def test_the_reference_runs_everywhere(operator):
    for device, line in dispatch.AUTO[operator].items():
        assert list(line)[-1] == "reference"
        assert all(line.values()), "every entry says why it stands where it does"
        for reason in line.values():
            assert len(reason) <= 60, reason
            assert not any(map(str.isdigit, reason)), f"figures are in benchmarks/results: {reason}"
        assert dispatch.missing(operator, "reference", device) is None


CHEAP = {
    "residual_norm": lambda x: residual_norm(x, x, torch.ones(8, device=x.device))[1],
    "swiglu": swiglu,
}


ON_META = CHEAP | {"linear_logprob": lambda x: linear_logprob(x, x, torch.arange(5, device=x.device))}


@pytest.mark.parametrize("operator", ON_META)
@pytest.mark.parametrize("gradients", [False, True])
def test_tensors_without_numbers(operator, gradients, monkeypatch):
    """Give results without numbers, however many elements there would be."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    x = torch.empty(5, 8, device="meta", requires_grad=gradients)
    with torch.set_grad_enabled(gradients):
        got = ON_META[operator](x)
    assert got.is_meta
    assert got.requires_grad == gradients
    if gradients:
        got.sum().backward()
        assert x.grad.shape == (5, 8)


@pytest.fixture
def called(monkeypatch):
    """Names of the functions of implementations that were called, apart from usual calls."""
    names, original = [], dispatch.call
    monkeypatch.setattr(dispatch, "call", lambda *args: names.append(args[0].__name__) or original(*args))
    return names


@pytest.mark.parametrize("operator", CHEAP)
@pytest.mark.parametrize("few", [39, 40])
def test_cheap_operators_without_a_kernel_leave_few_elements_to_pytorch(operator, few, called, monkeypatch):
    """With and without gradients, whose results have to be the same bits: those of a policy and its reference."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", few)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)  # has no kernel on the CPU
    run = {"residual_norm": lambda x: residual_norm(x, x, torch.ones(8).double())[1], "swiglu": swiglu}[operator]
    got = run(x)
    with torch.no_grad():
        assert torch.equal(run(x), got)
    assert called == (["forward"] * 2 if few < x.numel() else [])
    assert got.requires_grad


@pytest.mark.skipif(bool(native.missing("cpu")), reason=str(native.missing("cpu")))
@pytest.mark.parametrize("operator", CHEAP)
@pytest.mark.parametrize("few", [0, 2**17])
def test_cheap_operators_on_the_cpu(operator, few, monkeypatch):
    """The same bits for every caller: with gradients or without, of all rows or of one, seen by a profile or not."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", few)
    x = torch.randn(5, 8, requires_grad=True)
    got = CHEAP[operator](x)
    with torch.no_grad():
        assert torch.equal(CHEAP[operator](x), got)
        assert torch.equal(CHEAP[operator](x[2:3]), got[2:3])
        with torch.profiler.profile():
            assert torch.equal(CHEAP[operator](x), got)
    with torch.profiler.profile():
        assert torch.equal(CHEAP[operator](x), got)
    if operator == "swiglu" or not few:  # PyTorch computes a LayerNorm of few elements
        with dispatch.batch_invariant():
            assert torch.equal(CHEAP[operator](x), got)
    assert got.requires_grad
