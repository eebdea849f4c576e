"""linear_logprob's gradients where they are computed along with the log-probabilities."""

import importlib
import importlib.util
import math

import pytest
import torch
from helpers.logprobs import compare, make
from helpers.numerics import implementations

from dph_kernels import dispatch
from dph_kernels.launcher import TritonDevice
from dph_kernels.linear_logprob import linear_logprob

DTYPES = {"cpu": [torch.float32], "triton": [torch.float16, torch.bfloat16]}  # that a backend does it in
WAYS = [
    pytest.param(*p.values, dtype, marks=p.marks, id=f"{p.id}-{str(dtype).removeprefix('torch.')}")
    for p in implementations("linear_logprob")
    for dtype in DTYPES.get(p.values[1], [])
    if not dispatch.missing("linear_logprob", *reversed(p.values), dtype) or p.values[0] == "cuda"
]


@pytest.fixture
def joint(small_tiles, backend, dtype):
    """The calls of the backward pass, where gradients are computed along on every processor, 16 rows at a time."""
    module = importlib.import_module(f"dph_kernels.linear_logprob.{'native' if backend == 'cpu' else 'triton'}")
    small_tiles.setattr(module, "LEAST_ROWS", 16)
    if backend == "cpu":
        small_tiles.setattr(module, "mkl_is_faster", lambda: True)
        small_tiles.setattr(module, "MOST_LOGITS", 16 * 130)
    else:
        small_tiles.setattr(module, "JOINT", (dtype,))  # the interpreter has no bf16
        small_tiles.setattr(module, "_joint_rows", lambda gpu, _: module._config(gpu).block_m)
    asked, original = [], module.backward

    def backward(**given):
        asked.append((given["hidden_needed"], given["weight_needed"]))
        return original(**given)

    small_tiles.setattr(module, "backward", backward)
    return asked


def problem(rows, columns, vocabulary, device, dtype):
    """As ``make``; on a GPU, whose tiles are larger, as many times the rows."""
    return make(rows if device == "cpu" else 8 * rows, columns, vocabulary, dtype, device)


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
@pytest.mark.parametrize("size", [(1, 16, 33), (16, 1, 1), (65, 16, 111), (40, 33, 97)])
@pytest.mark.parametrize("upstream", [1.0, -0.7, 0.0, 1e-6, torch.nan])
@pytest.mark.usefixtures("poisoned_empty")
def test_one_upstream_gradient_for_all_rows(upstream, size, device, backend, dtype, joint):
    hidden, weight, targets = problem(*size, device, dtype)
    grad = torch.tensor(upstream, device=device).expand(len(hidden))
    if upstream == upstream:
        compare(hidden, weight, targets, backend, grad)
        assert not joint
    else:
        linear_logprob(hidden, weight, targets, backend=backend).backward(grad)
        assert hidden.grad.isnan().all()
        assert weight.grad.isnan().all()


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
def test_another_upstream_gradient_for_each_row(device, backend, dtype, joint):
    """The weights' gradient is computed anew; that of the states is known."""
    compare(*problem(65, 16, 111, device, dtype), backend)
    assert joint == [(False, True)]


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
def test_equal_upstream_gradients_in_memory_of_their_own(device, backend, dtype, joint):
    """As those of a mean."""
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    compare(hidden, weight, targets, backend, torch.full((len(hidden),), -0.5, device=device))
    assert not joint


def rows_of_weights(kind, rows, device):
    weights = torch.randn(rows, device=device).double()
    return {
        "fp32": weights.float(),
        "bf16": weights.bfloat16(),
        "fp64": weights,
        "mask": (weights > 0).float(),
        "strided": weights.float().repeat_interleave(2)[::2],
        "negated": torch._neg_view(weights.float()),
    }[kind]


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
@pytest.mark.parametrize("scale", [1.0, -0.7, 1e-6])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp64", "mask", "strided", "negated"])
@pytest.mark.usefixtures("poisoned_empty")
def test_row_weights(kind, scale, device, backend, dtype, joint):
    """As upstream gradients, up to a factor: no gradient is computed a second time."""
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    row_weights = rows_of_weights(kind, len(hidden), device)
    compare(hidden, weight, targets, backend, row_weights.float() * scale, row_weights=row_weights)
    assert not joint


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
def test_a_weighted_sum_and_what_its_weights_get(device, backend, dtype, joint):
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    row_weights = rows_of_weights("fp32", len(hidden), device).requires_grad_()
    logprobs = linear_logprob(hidden, weight, targets, row_weights=row_weights, backend=backend)
    ((row_weights * logprobs).sum() / row_weights.sum()).backward()
    assert not joint
    expected, total = row_weights.detach(), row_weights.detach().sum()
    torch.testing.assert_close(row_weights.grad, (logprobs - (expected * logprobs).sum() / total).detach() / total)
    plain = linear_logprob(hidden, weight, targets, uniform=False, backend=backend)
    grads = torch.autograd.grad(plain, (hidden, weight), expected / total)
    for ours, want in zip((hidden.grad, weight.grad), grads, strict=True):
        off = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, want, rtol=off, atol=off * want.abs().max().item())


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
@pytest.mark.parametrize("kind", ["another row", "another sign", "zeros", "infinite", "changed"])
def test_row_weights_that_the_upstream_gradients_are_not(kind, device, backend, dtype, joint):
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    row_weights = rows_of_weights("fp32", len(hidden), device).abs() + 0.1
    grad = row_weights.clone()
    if kind == "another row":
        grad[3] *= 1 + 1e-5
    elif kind == "another sign":
        grad[-1].neg_()
    elif kind == "zeros":
        row_weights.zero_()
    elif kind == "infinite":
        row_weights[2] = math.inf
    if kind != "changed":
        compare(hidden, weight, targets, backend, grad, row_weights=row_weights)
        assert joint == [(False, True)]
        return
    logprobs = linear_logprob(hidden, weight, targets, row_weights=row_weights, backend=backend)
    expected = torch.autograd.grad(logprobs, (hidden, weight), grad, retain_graph=True)
    logprobs = linear_logprob(hidden, weight, targets, row_weights=row_weights, backend=backend)
    row_weights.mul_(2)  # before the backward pass; the upstream gradients are still those that were announced
    for ours, want in zip(torch.autograd.grad(logprobs, (hidden, weight), grad), expected, strict=True):
        torch.testing.assert_close(ours, want)


@pytest.mark.gpu
def test_the_gpu_is_not_waited_for_after_a_sum():
    hidden, weight, targets = make(3000, 64, 500, torch.bfloat16, "cuda")
    linear_logprob(hidden, weight, targets, backend="triton").sum().backward()  # compiled from here on
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_logprob(hidden, weight, targets, backend="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("reduce", [torch.sum, torch.mean])
def test_in_a_cuda_graph(reduce):
    """Where a mean's gradients cannot be seen to be equal, the weights' is computed anew."""
    hidden, weight, targets = make(3000, 64, 500, torch.bfloat16, "cuda")

    def step():
        loss = reduce(linear_logprob(hidden, weight, targets, backend="triton"))
        return torch.autograd.grad(loss, (hidden, weight))

    expected, graph = step(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for ours, want in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
def test_gradients_that_are_asked_for_twice(device, backend, dtype, joint):
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    loss = linear_logprob(hidden, weight, targets, backend=backend).sum()
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0, device=device), retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(loss, (hidden, weight))
    assert joint == [(True, True)]
    assert all(map(torch.equal, first, kept))
    for twice, once in zip(first, second, strict=True):
        off = {}
        if dtype != torch.float32:  # probabilities in half precision were rounded on two ways
            off = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps * twice.abs().max().item()}
        torch.testing.assert_close(twice, 2 * once, **off)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
@pytest.mark.parametrize("kind", ["negated", "batched"])
def test_upstream_gradients_that_pytorch_has_put_off(kind, device, backend, dtype, joint):
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    got = linear_logprob(hidden, weight, targets, backend=backend)
    grad = torch.ones_like(got)
    expected = torch.autograd.grad(got, (hidden, weight), -grad, retain_graph=True)
    got = linear_logprob(hidden, weight, targets, backend=backend)
    if kind == "negated":
        found = torch.autograd.grad(got, (hidden, weight), torch._neg_view(grad))
    else:
        both = torch.autograd.grad(got, (hidden, weight), torch.stack([grad, -grad]), is_grads_batched=True)
        found = [x[1] for x in both]
    for ours, want in zip(found, expected, strict=True):
        off = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, want, rtol=off, atol=off * want.abs().max().item())


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
@pytest.mark.parametrize("layout", ["expanded", "transposed", "sliced rows", "sliced columns", "negated"])
def test_states_of_any_strides(layout, device, backend, dtype, joint):
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    hidden = hidden.detach()
    hidden = {
        "expanded": hidden[:1].expand(len(hidden), -1),
        "transposed": hidden.T.contiguous().T,
        "sliced rows": hidden.repeat_interleave(2, 0)[::2],
        "sliced columns": torch.cat([hidden, hidden[:, :1]], 1)[:, :16],
        "negated": torch._neg_view(hidden),
    }[layout]
    compare(hidden.requires_grad_(), weight, targets, backend, torch.ones((), device=device).expand(len(hidden)))
    assert len(joint) == (layout == "negated")  # which goes through PyTorch's dispatcher


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
@pytest.mark.parametrize("why", ["not uniform", "frozen states", "frozen weights", "no gradients", "no room"])
def test_gradients_that_would_be_for_nothing_are_not_computed(why, device, backend, dtype, joint, monkeypatch):
    module = importlib.import_module(f"dph_kernels.linear_logprob.{'native' if backend == 'cpu' else 'triton'}")
    monkeypatch.delattr(module, "forward_and_gradients")
    if why == "no room":
        monkeypatch.setattr(module, "LEAST_ROWS", 10**6)
    hidden, weight, targets = problem(4000 if why == "no room" else 65, 16, 111, device, dtype)
    hidden.requires_grad_(why != "frozen states")
    weight.requires_grad_(why != "frozen weights")
    with torch.set_grad_enabled(why != "no gradients"):
        got = linear_logprob(hidden, weight, targets, uniform=why != "not uniform", backend=backend)
    assert got.requires_grad == (why != "no gradients")


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
def test_strided_weights(device, backend, dtype, joint):
    """C++ leaves them to the other way, Triton copies them."""
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    weight = weight.detach().T.contiguous().T.requires_grad_()
    compare(hidden, weight, targets, backend, torch.ones((), device=device).expand(len(hidden)))
    assert len(joint) == (backend == "cpu")


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
@pytest.mark.usefixtures("poisoned_empty")
def test_results_are_the_same_with_gradients_along(device, backend, dtype, joint):
    """Log-probabilities, entropy and arg-max; targets outside of the vocabulary are refused."""
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    along = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    plain = linear_logprob(hidden, weight, targets, statistics=True, uniform=False, backend=backend)
    torch.testing.assert_close(along, plain)
    assert [x.requires_grad for x in along] == [True, False, False]
    along[0].sum().backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    if device == "cpu":
        with pytest.raises(ValueError, match=r"targets: expected values in \[0, 111\), got 111"):
            linear_logprob(hidden, weight, targets.clamp(min=111), backend=backend)


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
@pytest.mark.parametrize("gap", [5.0, 30.0, 1e3])
def test_rows_that_are_sure(gap, device, backend, dtype, joint):
    """Of their target, whose gradient is the small rest; of another token, far above it; of one in another block."""
    vocabulary = 700 if device == "cuda" else 111
    weight = torch.randn(vocabulary, 16, device=device).mul(0.01).to(dtype)
    weight[:, 0] = 0
    weight[[3, vocabulary - 2], 0] = 1
    hidden = torch.randn(48, 16, device=device).to(dtype)
    hidden[:, 0] = gap
    targets = torch.tensor([3, vocabulary - 2, 40] * 16, device=device)
    compare(
        hidden.requires_grad_(), weight.requires_grad_(), targets, backend, torch.ones((), device=device).expand(48)
    )
    weight.detach()[3, 0] = 2  # by itself above all others
    compare(hidden, weight, targets, backend, torch.ones((), device=device).expand(48))
    assert not joint


@pytest.mark.parametrize(("device", "backend", "dtype"), [w for w in WAYS if w.values[1] == "triton"])
def test_tokens_that_are_impossible(device, backend, dtype, joint):
    """Minus infinity among the logits, a whole block of them too; and as a target."""
    vocabulary = 700 if device == "cuda" else 111
    hidden = torch.ones(33, 4, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, 4, device=device).to(dtype)
    weight[vocabulary // 2 :] = -math.inf
    targets = torch.arange(33, device=device) * (vocabulary // 66)
    targets[5] = vocabulary - 1
    got = linear_logprob(hidden, weight.requires_grad_(), targets, statistics=True, backend=backend)
    plain = linear_logprob(hidden, weight, targets, statistics=True, uniform=False, backend=backend)
    torch.testing.assert_close(got, plain)
    assert got[0][5] == -math.inf


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_rows_for_which_there_is_room():
    """Whole tiles, within 300 MB; none where the sums of the weights' gradient alone take more."""
    module = importlib.import_module("dph_kernels.linear_logprob.triton")
    gpu = TritonDevice(torch.device("meta"), 90, 132)
    for vocabulary, width, least in [(50272, 768, 1024), (256, 768, 50_000), (50272, 64, 2000), (100_000, 768, 0)]:
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, device="meta")
        rows = module._joint_rows(gpu, weight)
        assert rows >= least
        assert rows % 128 == 0
        assert (rows == 0) == (least == 0)
        assert rows * (2 * vocabulary + 2 * width + 4 * width) + 4 * weight.numel() <= 300e6 or not rows


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("size", [(200_000, 768, 256), (200_000, 64, 256), (3000, 768, 50272)])
def test_grids_that_cuda_takes(size):
    module = importlib.import_module("dph_kernels.linear_logprob.triton")

    class Device(TritonDevice):
        def launch(self, kernel, grid, *_):
            grids.append(grid)

    rows, width, vocabulary = size
    hidden, weight = (torch.empty(n, width, dtype=torch.bfloat16, device="meta") for n in (rows, vocabulary))
    grids, targets = [], torch.empty(rows, dtype=torch.int64, device="meta")
    module._forward_and_gradients(Device(torch.device("meta"), 90, 132), hidden, weight, targets, True)
    assert grids
    assert all(max(grid[1:], default=0) <= 65_535 for grid in grids)


@pytest.mark.parametrize(("device", "backend", "dtype"), WAYS)
def test_half_precision_is_scaled_by_the_upstream_gradient_itself(device, backend, dtype, joint):
    """Not by what is left of it in half precision: that would show in the size of all gradients."""
    hidden, weight, targets = problem(65, 16, 111, device, dtype)
    scale = torch.tensor(1 / 11540, device=device)
    got = torch.autograd.grad(linear_logprob(hidden, weight, targets, backend=backend).sum(), (hidden, weight), scale)
    once = torch.autograd.grad(linear_logprob(hidden, weight, targets, backend=backend).sum(), (hidden, weight))
    for ours, whole in zip(got, once, strict=True):
        ours, whole = ours.double().flatten(), whole.double().flatten()
        assert abs((ours @ whole) / (whole @ whole) * 11540 - 1) < 5e-4


@pytest.mark.gpu
def test_extra_memory_is_bounded():
    hidden, weight, targets = make(16384, 768, 50272, torch.bfloat16, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_logprob(hidden, weight, targets, statistics=True, backend="triton")[0].sum().backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before < gradients + 300e6
