"""linear_logprob: every backend against plain PyTorch in the same precision and in fp64."""

import importlib

import pytest
import torch
from helpers.logprobs import DTYPES, as_fp64, compare, eager, make
from helpers.numerics import assert_close_to_fp64, implementations, skip_where_unsupported, strange_nans

from dph_kernels.linear_logprob import linear_logprob

reference = importlib.import_module("dph_kernels.linear_logprob.reference")

SIZES = [(1, 1, 1), (2, 3, 5), (63, 64, 65), (64, 63, 111), (65, 111, 257), (257, 2, 2), (1, 257, 64)]
BACKENDS = implementations("linear_logprob")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    compare(*make(*size, dtype, device), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_statistics(device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight, targets = make(65, 63, 111, dtype, device)
    got = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    same, truth = eager(hidden, weight, targets), eager(*as_fp64(hidden, weight), targets)
    assert_close_to_fp64(got[0], same[0], truth[0], "log-probabilities")
    assert_close_to_fp64(got[1], same[1], truth[1], "entropy")
    assert torch.equal(got[2], truth[2])
    assert got[0].requires_grad
    assert not got[1].requires_grad
    assert not got[2].requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_argmax_of_a_tie_is_the_lowest_index(device, backend, dtype):
    """Of all tokens, and of three that lie in blocks far from each other."""
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight = torch.zeros(3, 4, device=device, dtype=dtype), torch.zeros(65, 4, device=device, dtype=dtype)
    targets = torch.zeros(3, dtype=torch.int64, device=device)
    _, entropy, best = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    assert best.tolist() == [0, 0, 0]
    torch.testing.assert_close(entropy, torch.full_like(entropy, 65).log())
    weight = torch.zeros(2300, 4, device=device, dtype=dtype)
    weight[[1100, 1101, 1500, 2200]] = 1
    assert linear_logprob(hidden + 1, weight, targets, statistics=True, backend=backend)[2].tolist() == [1100] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded hidden", "expanded weight", "sliced rows"])
def test_any_strides(layout, device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight, targets = make(64, 63, 65, dtype, device)
    hidden, weight = hidden.detach(), weight.detach()
    if layout == "transposed":
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    elif layout == "strided":
        hidden, weight, targets = hidden[:, ::2], weight[:, ::2], targets.repeat_interleave(2)[::2]
    elif layout == "expanded hidden":
        hidden = hidden[:1].expand(64, -1)
    elif layout == "expanded weight":
        weight = weight[:, :1].expand(-1, 63)
    else:
        hidden, targets = hidden[1::3], targets[1::3]
    compare(hidden.requires_grad_(), weight.requires_grad_(), targets, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("kind", ["expanded", "strided", "reversed"])
def test_any_upstream_gradient(kind, device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight, targets = make(65, 16, 33, dtype, device)
    grad = {
        "expanded": torch.tensor(0.7, device=device).expand(65),
        "strided": torch.randn(130, device=device)[::2],
        "reversed": torch.randn(65, 2, device=device).T[1],
    }[kind]
    compare(hidden, weight, targets, backend, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_no_rows(device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight, targets = make(0, 8, 11, dtype, device)
    logprobs, entropy, best = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    assert logprobs.shape == entropy.shape == best.shape == (0,)
    logprobs.sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1e4), (torch.float16, 3e4), (torch.bfloat16, 1e30)])
def test_extreme_logits(dtype, scale, device, backend):
    """Logits far beyond fp16's largest number, 65504; the gradients themselves fit."""
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden = torch.tensor([[scale, 0.0], [-scale, 0.0], [0.0, scale]], device=device, dtype=dtype).requires_grad_()
    weight = torch.tensor([[4.0, 0.0], [2.0, 4.0], [-4.0, 4.0]], device=device, dtype=dtype).requires_grad_()
    for column in range(3):
        targets = torch.full((3,), column, device=device)
        got = linear_logprob(hidden, weight, targets, backend=backend)
        wide = as_fp64(hidden, weight)
        truth = eager(*wide, targets)[0]
        torch.testing.assert_close(got.double(), truth, rtol=1e-6, atol=1e-6)
        assert (got <= 0).all()
        grads = torch.autograd.grad(got.sum(), (hidden, weight))
        for ours, true in zip(grads, torch.autograd.grad(truth.sum(), wide), strict=True):
            torch.testing.assert_close(ours, true.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_a_certain_token_is_never_above_zero(device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden = torch.randn(257, 33, device=device).to(dtype)
    weight = torch.cat([hidden[:64] * 3, torch.randn(64, 33, device=device).to(dtype)])
    targets = (hidden @ weight.T).argmax(-1)
    got = linear_logprob(hidden, weight, targets, backend=backend)
    assert (got > -1e-3).any()
    assert (got <= 0).all()


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e4])
def test_tiny_and_huge_upstream_gradients(size, dtype, device, backend):
    """A mean over many rows, and a loss that is scaled for fp16: what lies between does not go through halves as it is.

    The floor is relative to the result, however small, but for what fp16 cannot hold.
    """
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight, targets = make(6, 16, 1000, dtype, device, scale=0.1)
    grad = torch.rand(6, device=device).mul(size)
    got = linear_logprob(hidden, weight, targets, backend=backend)
    wide = as_fp64(hidden, weight)
    truth = torch.autograd.grad(eager(*wide, targets)[0], wide, grad.double())
    for ours, true in zip(torch.autograd.grad(got, (hidden, weight), grad), truth, strict=True):
        step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of the smallest numbers
        error = (ours.double() - true).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps * true.abs().max() + step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("nan", strange_nans())
def test_nan_is_not_hidden(nan, device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight, targets = make(3, 4, 5, dtype, device)
    with torch.no_grad():
        spoilt = weight.clone()
        spoilt[2, 1] = nan
        assert linear_logprob(hidden, spoilt, targets, backend=backend).isnan().all()
        hidden[1, 2] = nan
    got = linear_logprob(hidden, weight, targets, backend=backend)
    assert got.isnan().tolist() == [False, True, False]
    got[[0, 2]].sum().backward()
    assert hidden.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight, targets = make(65, 63, 111, dtype, device)
    got = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    got[0].sum().backward()
    for value in (got[0], got[1], hidden.grad, weight.grad):
        assert value.isfinite().all()
    assert (got[2] >= 0).all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_nothing(frozen, monkeypatch):
    asked = []
    original = reference.backward

    def spy(**given):
        asked.append((given["hidden_needed"], given["weight_needed"]))
        return original(**given)

    monkeypatch.setattr(reference, "backward", spy)
    hidden, weight, targets = make(5, 8, 11)
    tensors = {"hidden": hidden, "weight": weight}
    tensors[frozen].requires_grad_(False)
    linear_logprob(hidden, weight, targets, backend="reference").sum().backward()
    assert asked == [(frozen != "hidden", frozen != "weight")]
    assert tensors[frozen].grad is None
    del tensors[frozen]
    assert next(iter(tensors.values())).grad.isfinite().all()


def test_gradcheck():
    hidden, weight, targets = make(5, 4, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets), (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck(statistics, device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    hidden, weight, targets = make(5, 8, 11, dtype, device)
    torch.library.opcheck(torch.ops.dph.linear_logprob.default, (hidden, weight, targets, statistics, backend))
    logprobs, normaliser, *_ = torch.ops.dph.linear_logprob(hidden, weight, targets, False, backend)
    tensors = [x.detach() for x in (torch.ones_like(logprobs), hidden, weight, targets, normaliser)]
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(torch.ops.dph.linear_logprob_backward.default, (*tensors, *needs, backend))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_compiles_as_one_graph(device, backend):
    hidden, weight, targets = make(5, 8, 11, device=device)

    def loss(hidden, weight):
        logprobs, entropy, _ = linear_logprob(hidden.tanh(), weight, targets, statistics=True, backend=backend)
        return (logprobs * entropy).sum()

    expected = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5)}, r"hidden: expected shape \[R, C\], got \[5\]"),
        ({"hidden": torch.zeros(5, 8, dtype=torch.int64)}, "hidden: expected float16 or .*float64, got int64"),
        ({"weight": torch.zeros(11, 7)}, r"weight: expected shape \[V, 8\], got \[11, 7\]"),
        ({"weight": torch.zeros(11, 8).half()}, "weight: expected float32, got float16"),
        ({"weight": torch.zeros(11, 8, device="meta")}, "weight: expected a tensor on cpu, got one on meta"),
        ({"weight": torch.zeros(0, 8)}, r"weight: expected at least one row \(V >= 1\), got shape \[0, 8\]"),
        ({"weight": None}, "weight: expected a tensor, got NoneType"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets: expected shape \[5\], got \[4\]"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, "targets: expected int64, got int32"),
        ({"targets": torch.zeros(5, dtype=torch.int64, device="meta")}, "targets: expected a tensor on cpu, got one"),
        ({"targets": torch.tensor([0, 1, 11, 2, 3])}, r"targets: expected values in \[0, 11\), got 11"),
        ({"targets": torch.tensor([0, 1, -100, 2, 3])}, r"targets: expected values in \[0, 11\), got -100"),
        ({"row_weights": torch.zeros(4)}, r"row_weights: expected shape \[5\], got \[4\]"),
        ({"row_weights": torch.zeros(5, dtype=torch.int64)}, "row_weights: expected float16 or .*float64, got int64"),
        ({"row_weights": torch.zeros(5, device="meta")}, "row_weights: expected a tensor on cpu, got one on meta"),
        ({"row_weights": torch.zeros(5), "uniform": False}, "row_weights: expected None with uniform=False"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"hidden": torch.zeros(5, 8), "weight": torch.zeros(11, 8), "targets": torch.arange(5), **change}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match=r"linear_logprob: backend 'cuda' cannot run: .+"):
        linear_logprob(torch.zeros(5, 8), torch.zeros(11, 8), torch.arange(5), backend="cuda")
