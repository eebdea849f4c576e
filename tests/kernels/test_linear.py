"""Products of rows with weights: fp64's values in every instruction set, and rows that do not depend on others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dph_kernels.linear as package
from dph_kernels import dispatch, native
from dph_kernels.linear import apply_linear, linear
from dph_kernels.linear import native as linear_native

MISSING = native.missing("cpu")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Also small weights, which PyTorch multiplies otherwise, without gradients."""
    monkeypatch.setattr(package, "LARGE", 0)
    with torch.no_grad(), dispatch.batch_invariant():
        yield


@pytest.fixture(params=[4, 8, 16])
def lanes(request):
    if native.module().linear_lanes(request.param) != request.param:
        native.module().linear_lanes(16)
        pytest.skip(f"the CPU has no vectors of {request.param} floats")
    yield request.param
    native.module().linear_lanes(16)


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


SIZES = [
    (1, 1, 1),
    (3, 7, 5),
    (4, 16, 4),
    (17, 130, 33),
    (70, 576, 100),
    (5, 33, 4),
    (9, 2100, 3),
    (0, 8, 4),
    (2, 0, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
def test_values_are_those_of_fp64(rows, depth, columns, dtype, lanes):
    x, weight, bias = (
        drawn(*size, seed=i).to(dtype) for i, size in enumerate([(rows, depth), (columns, depth), (columns,)])
    )
    for given in (None, bias):
        exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
        found = linear(x, weight, given)
        assert found.dtype == dtype
        if dtype == torch.float32:
            assert found == pytest.approx(exact, rel=1e-5, abs=3e-6 * max(depth, 1) ** 0.5)
        else:  # rounded once
            assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
        for row in range(0, rows, 3):
            assert torch.equal(linear(x[row : row + 1], weight, given)[0], found[row])


def test_strided_rows_and_weights_and_any_number_of_threads():
    x, weight = drawn(40, 300)[:, :200], drawn(90, 200, seed=1)
    expected = linear(x.contiguous(), weight)
    assert torch.equal(linear(x, weight), expected)
    assert torch.equal(linear(x, drawn(90, 300, seed=2)[:, :200].copy_(weight)), expected)
    assert torch.equal(linear(x.t().contiguous().t(), weight.t().contiguous().t()), expected)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert torch.equal(linear(x, weight), expected)
    finally:
        torch.set_num_threads(threads)


def test_rows_have_any_number_of_dimensions():
    x, weight = drawn(2, 3, 4, 50), drawn(8, 50, seed=1)
    assert torch.equal(linear(x, weight).flatten(0, -2), linear(x.flatten(0, -2), weight))
    assert linear(x[:0], weight).shape == (0, 3, 4, 8)


def test_nan_and_infinity_stay_in_their_rows():
    x, weight = drawn(6, 50), drawn(8, 50, seed=1)
    expected = linear(x, weight)
    x[2, 3], x[4, 49] = float("nan"), float("inf")
    found = linear(x, weight)
    assert found[2].isnan().all()
    assert found[4].isinf().all()
    assert torch.equal(found[[0, 1, 3, 5]], expected[[0, 1, 3, 5]])


def test_everything_else_is_pytorch_s(monkeypatch):
    """Other dtypes, vectors, gradients, autocast, and modules with hooks; errors are those of PyTorch."""
    monkeypatch.setattr(package, "forward", None)
    x, weight = drawn(6, 5), drawn(8, 5, seed=1)
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    assert torch.equal(linear(x[0], weight), F.linear(x[0], weight))
    with torch.enable_grad():
        assert linear(x, weight.requires_grad_()).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight.detach()).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, drawn(8, 4))
    module = nn.Linear(5, 8)
    module.register_forward_hook(lambda *_: torch.zeros(1))
    assert torch.equal(apply_linear(module, x), torch.zeros(1))
    monkeypatch.setattr(package, "LARGE", 10**6)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("rows", [1, 32, 33, 200])
def test_bf16_without_bf16_instructions_is_computed_in_fp32(rows, monkeypatch):
    """Outside of batch_invariant, too: few rows by the kernel, more by fp32 products of panels of weights."""
    monkeypatch.setattr(package, "has_bf16_products", lambda: False)
    monkeypatch.setattr(linear_native, "PANEL", 40 * 48)  # a last panel that is not full
    x, weight, bias = drawn(rows, 48).bfloat16(), drawn(90, 48, seed=1).bfloat16(), drawn(90, seed=2).bfloat16()
    token = dispatch._BATCH_INVARIANT.set(False)
    try:
        for given in (None, bias):
            exact = F.linear(x.double(), weight.double(), None if given is None else given.double())
            found = linear(x, weight, given)
            assert found.dtype == torch.bfloat16
            assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
        monkeypatch.setattr(package, "forward", None)
        monkeypatch.setattr(package, "forward_by_panels", None)
        assert torch.equal(linear(x.float(), weight.float()), F.linear(x.float(), weight.float()))
        with torch.enable_grad():
            assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        monkeypatch.setattr(package, "has_bf16_products", lambda: True)
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
    finally:
        dispatch._BATCH_INVARIANT.reset(token)
