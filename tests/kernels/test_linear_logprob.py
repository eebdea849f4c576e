"""linear_logprob: every backend against plain PyTorch in the same precision and in fp64."""

import dataclasses
import importlib
import importlib.util
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_close_to_fp64, implementations, skip_where_unsupported, strange_nans
from torch.utils._python_dispatch import TorchDispatchMode

from dph_kernels.linear_logprob import linear_logprob

ROOT = Path(__file__).resolve().parents[2]
reference = importlib.import_module("dph_kernels.linear_logprob.reference")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [(1, 1, 1), (2, 3, 5), (63, 64, 65), (64, 63, 111), (65, 111, 257), (257, 2, 2), (1, 257, 64)]
BACKENDS = implementations("linear_logprob")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of at most 16 rows and 32 tokens, so that small problems have several in each direction."""
    monkeypatch.setattr(reference, "CHUNK", 32)
    native = importlib.import_module("dph_kernels.linear_logprob.native")
    monkeypatch.setattr(native.Engine, "most_rows", 16)
    monkeypatch.setattr(native.Engine, "most_columns", 32)
    if importlib.util.find_spec("triton"):
        triton = importlib.import_module("dph_kernels.linear_logprob.triton")
        monkeypatch.setattr(triton.Engine, "side", 16)
    return monkeypatch


def make(rows, columns, vocabulary, dtype=torch.float32, device="cpu", scale=1.0):
    hidden = torch.randn(rows, columns, device=device).mul(scale).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, columns, device=device).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (rows,), device=device)


def eager(hidden, weight, targets):
    """What one would write: (log-probabilities, entropy, arg-max)."""
    logits = hidden @ weight.T
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    chosen = scores.gather(-1, targets[:, None]).squeeze(-1)
    return chosen, -(scores.exp() * scores).sum(-1), logits.argmax(-1)


def as_fp64(*tensors):
    return [x.detach().double().requires_grad_() for x in tensors]


def compare(hidden, weight, targets, backend, grad=None):
    """Values and both gradients of an operator call against eager PyTorch."""
    got = linear_logprob(hidden, weight, targets, backend=backend)
    same = eager(hidden, weight, targets)[0]
    wide = as_fp64(hidden, weight)
    truth = eager(*wide, targets)[0]
    assert_close_to_fp64(got, same, truth, "log-probabilities")
    assert got.dtype == torch.promote_types(hidden.dtype, torch.float32)
    assert (got <= 0).all()
    grad = torch.randn_like(got) if grad is None else grad
    triples = zip(
        ("hidden", "weight"),
        torch.autograd.grad(got, (hidden, weight), grad),
        torch.autograd.grad(same, (hidden, weight), grad),
        torch.autograd.grad(truth, wide, grad.double()),
        (hidden, weight),
        strict=True,
    )
    for name, ours, theirs, true, tensor in triples:
        assert ours.dtype == tensor.dtype
        assert_close_to_fp64(ours, theirs, true, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, device, backend, dtype):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    compare(*make(*size, dtype, device), backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_statistics(device, backend):
    hidden, weight, targets = make(65, 63, 111, device=device)
    got = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    same, truth = eager(hidden, weight, targets), eager(*as_fp64(hidden, weight), targets)
    assert_close_to_fp64(got[0], same[0], truth[0], "log-probabilities")
    assert_close_to_fp64(got[1], same[1], truth[1], "entropy")
    assert torch.equal(got[2], truth[2])
    assert got[0].requires_grad
    assert not got[1].requires_grad
    assert not got[2].requires_grad


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_argmax_of_a_tie_is_the_lowest_index(device, backend):
    hidden, weight = torch.zeros(3, 4, device=device), torch.zeros(65, 4, device=device)
    targets = torch.zeros(3, dtype=torch.int64, device=device)
    _, entropy, best = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    assert best.tolist() == [0, 0, 0]
    torch.testing.assert_close(entropy, torch.full_like(entropy, 65).log())


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded hidden", "expanded weight", "sliced rows"])
def test_any_strides(layout, device, backend):
    hidden, weight, targets = make(64, 63, 65, device=device)
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


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("kind", ["expanded", "strided", "reversed"])
def test_any_upstream_gradient(kind, device, backend):
    hidden, weight, targets = make(65, 16, 33, device=device)
    grad = {
        "expanded": torch.tensor(0.7, device=device).expand(65),
        "strided": torch.randn(130, device=device)[::2],
        "reversed": torch.randn(65, 2, device=device).T[1],
    }[kind]
    compare(hidden, weight, targets, backend, grad)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_no_rows(device, backend):
    hidden, weight, targets = make(0, 8, 11, device=device)
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


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_a_certain_token_is_never_above_zero(device, backend):
    hidden = torch.randn(257, 33, device=device)
    weight = torch.cat([hidden[:64] * 3, torch.randn(64, 33, device=device)])
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


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("nan", strange_nans())
def test_nan_is_not_hidden(nan, device, backend):
    hidden, weight, targets = make(3, 4, 5, device=device)
    with torch.no_grad():
        spoilt = weight.clone()
        spoilt[2, 1] = nan
        assert linear_logprob(hidden, spoilt, targets, backend=backend).isnan().all()
        hidden[1, 2] = nan
    got = linear_logprob(hidden, weight, targets, backend=backend)
    assert got.isnan().tolist() == [False, True, False]
    got[[0, 2]].sum().backward()
    assert hidden.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(device, backend):
    hidden, weight, targets = make(65, 63, 111, device=device)
    got = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    got[0].sum().backward()
    for value in (got[0], got[1], hidden.grad, weight.grad):
        assert value.isfinite().all()
    assert (got[2] >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("size", [(65, 16, 33), (15, 3, 111), (31, 65, 31), (49, 8, 97)])
def test_tiles_change_nothing(size, device, backend, dtype, small_tiles):
    skip_where_unsupported("linear_logprob", device, backend, dtype)
    compare(*make(*size, dtype, device), backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.usefixtures("small_tiles", "poisoned_empty")
def test_statistics_over_tiles(device, backend):
    """Rising logits: the largest moves from tile to tile, and with it entropy and arg-max."""
    hidden, weight, targets = make(65, 8, 111, device=device)
    weight = weight.detach() * torch.linspace(0.1, 20, 111, device=device)[:, None]
    got = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    same, truth = eager(hidden, weight, targets), eager(*as_fp64(hidden, weight), targets)
    for ours, theirs, true in zip(got[:2], same, truth, strict=False):
        assert_close_to_fp64(ours, theirs, true)
    assert torch.equal(got[2], truth[2])
    assert (got[2] // 32).unique().numel() > 2


@pytest.mark.parametrize(("device", "backend"), [p for p in BACKENDS if p.values[1] in ("cpu", "triton")])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_sums_in_half_precision_that_would_be_too_large_are_taken_by_rows(needs, device, backend, small_tiles):
    """Rounded once, as with sums of all rows: no gradient differs by more than the order of fp32 additions allows."""
    hidden, weight, targets = (x.detach() for x in make(65, 16, 111, torch.float16, device))
    module = importlib.import_module(f"dph_kernels.linear_logprob.{'native' if backend == 'cpu' else 'triton'}")
    logprobs, normaliser, *_ = module.forward(hidden, weight, targets, False)
    grad, results = torch.randn_like(logprobs), []
    for most in (2**20, 20 * 16):
        small_tiles.setattr(module.Engine, "most_sums", most)
        results.append(module.backward(grad, hidden, weight, targets, normaliser, *needs))
    for whole, by_rows, needed in zip(*results, needs, strict=True):
        assert (whole.numel() > 0) == needed
        torch.testing.assert_close(by_rows, whole, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.usefixtures("small_tiles")
def test_tokens_that_are_impossible(device, backend):
    """Logits of minus infinity, whole tiles of them first and last, have no part in anything."""
    hidden = torch.ones(3, 1, device=device)
    weight = torch.full((97, 1), -torch.inf, device=device)
    weight[40:44, 0] = torch.arange(4.0)
    targets = torch.tensor([40, 43, 1], device=device)
    logprobs, entropy, best = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    possible = torch.arange(4.0).log_softmax(-1)
    torch.testing.assert_close(logprobs.cpu(), torch.stack([possible[0], possible[3], torch.tensor(-torch.inf)]))
    assert best.tolist() == [43] * 3
    if backend != "reference":  # there 0 times minus infinity is NaN
        torch.testing.assert_close(entropy.cpu(), -(possible.exp() * possible).sum().expand(3))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_repeats_bit_for_bit(device, backend, small_tiles):
    hidden, weight, targets = make(40, 16, 65, device=device)
    results = []
    for _ in range(2):
        got = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
        results.append([*got, *torch.autograd.grad(got[0].square().sum(), (hidden, weight))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("limit", [1, 64, 1000])
def test_chunks_change_nothing(limit, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", limit)
    compare(*make(65, 16, 33), "reference")


def test_logits_never_exist_at_once(monkeypatch):
    """No tensor of the forward or backward pass is larger than a chunk of logits, of 257 * 111 in all."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            sizes = [x.numel() for x in (result if isinstance(result, tuple) else (result,)) if torch.is_tensor(x)]
            largest = max(largest, *sizes, 0)
            return result

    monkeypatch.setattr(reference, "CHUNK", 1024)
    hidden, weight, targets = (x.detach() for x in make(257, 4, 111))
    with Watch():
        logprobs, normaliser, *_ = reference.forward(hidden, weight, targets, True)
        reference.backward(torch.ones_like(logprobs), hidden, weight, targets, normaliser, True, True)
    assert 1024 * 0.8 < largest <= max(1024, hidden.numel())


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_costs_nothing(frozen, monkeypatch):
    asked = []
    original = reference.backward

    def spy(*args):
        asked.append(args[-2:])
        return original(*args)

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


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck(statistics, device, backend):
    hidden, weight, targets = make(5, 8, 11, device=device)
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


# The kernels themselves

NATIVE = [p for p in BACKENDS if p.values[1] == "cpu"]
INTERPRETED = [p for p in BACKENDS if p.values == ("cpu", "triton")]


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_without_onednn(device, backend, small_tiles):
    small_tiles.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    compare(*make(65, 16, 111), backend)


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_exponentials_are_those_of_fp64(device, backend):
    """Two tokens, so that a state's gradient is minus the probability of the other one, down to where it is 0.

    The distance itself, less the log of the sum, is rounded to half a unit in the last place of 8: 5e-7.
    """
    distances = torch.cat([torch.linspace(-100, 0, 4001), torch.tensor([-200.0, -1e30])])
    hidden, weight = distances[:, None].requires_grad_(), torch.tensor([[0.0], [1.0]])
    got = linear_logprob(hidden, weight, torch.zeros(len(hidden), dtype=torch.int64), backend=backend)
    (grad,) = torch.autograd.grad(got.sum(), hidden)
    torch.testing.assert_close(-grad[:, 0].double(), distances.double().sigmoid(), rtol=8e-7, atol=2e-38)


def far_rows(rows, stride):
    """fp32 logits [rows, 64], rows ``stride`` elements apart, in memory that exists only where it is touched."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reserves memory without using it, as Linux lets one do")
    size = 4 * ((rows - 1) * stride + 4096)
    area = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    whole = torch.frombuffer(area, dtype=torch.float32)
    logits = whole.as_strided((rows, 64), (stride, 1))
    logits.copy_(torch.randn(rows, 64))
    return logits


def far_tile():
    """Logits whose last row begins beyond 2**31 elements, and what the passes over them have to give."""
    logits = far_rows(3, 2**30 + 16)
    targets, upstream = torch.tensor([5, 0, 63]), torch.randn(3)
    wide = logits.clone().requires_grad_()
    logprobs = wide.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (grad,) = torch.autograd.grad(logprobs, wide, upstream)
    return logits, targets, upstream, logprobs.detach(), grad


@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_rows_beyond_32_bits_in_cpp(device, backend):
    native = importlib.import_module("dph_kernels.linear_logprob.native")
    logits, targets, upstream, expected, grad = far_tile()
    engine, logprobs, normaliser = native.Engine(1), torch.empty(3), torch.empty(2, 3)
    engine.reduce(logits, 0, True, targets, normaliser, logprobs, torch.empty(0), targets[:0])
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(engine.gradient(logits, 0, upstream, targets, normaliser).clone(), grad)


@pytest.mark.parametrize(("device", "backend"), INTERPRETED)
def test_rows_beyond_32_bits_in_triton(device, backend, monkeypatch):
    """The interpreter is told to report where the arithmetic of offsets overflows."""
    kernels = importlib.import_module("dph_kernels.linear_logprob.triton_kernels")
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    logits, targets, upstream, expected, grad = far_tile()
    logprobs, normaliser, none = torch.empty(3), torch.empty(2, 3), torch.empty(0)
    start = logits[0]  # the interpreter copies whole storages back: give it a small one
    start = torch.frombuffer(memoryview(start.numpy()), dtype=torch.float32)
    rows = {"targets": targets, "largest": normaliser[0], "log_sum": normaliser[1]}
    sizes = {"units": logits.stride(0) // 16, "columns": 64, "first": 0, "UNIT": 16, "BLOCK": 64}
    flags = {"START": True, "LAST": True, "STATISTICS": False}
    kernels.reduce_rows[(3,)](start, **rows, logprobs=logprobs, entropy=none, best=targets[:0], **flags, **sizes)
    torch.testing.assert_close(logprobs, expected)
    kernels.gradient_rows[(1, 3)](start, start, **rows, upstream=upstream, **sizes)
    torch.testing.assert_close(logits.clone(), grad)


@pytest.mark.parametrize("device", [*(p.values[0] for p in INTERPRETED), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_triton_gives_nan_for_a_target_outside_of_the_vocabulary(device, small_tiles):
    """The host does not look at targets on a GPU: nothing may be read or written in other places then."""
    hidden, weight, targets = (x.detach() for x in make(5, 8, 65, device=device))
    targets[1], targets[3] = -100, 65
    triton = importlib.import_module("dph_kernels.linear_logprob.triton")
    logprobs, normaliser, *_ = triton.forward(hidden, weight, targets, False)
    assert logprobs.isnan().tolist() == [False, True, False, True, False]
    grads = triton.backward(torch.ones_like(logprobs), hidden, weight, targets, normaliser, True, True)
    expected = reference.backward(
        torch.ones_like(logprobs)[::2], hidden[::2], weight, targets[::2], normaliser[:, ::2], True, False
    )[0]
    torch.testing.assert_close(grads[0][::2], expected)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "backend"), [p for p in BACKENDS if p.values[1] in ("cpu", "triton")])
def test_more_logits_than_32_bits_count(device, backend):
    """2**31 and some logits of one-element states; what every row has to give is known."""
    if (device, backend) == ("cpu", "triton"):
        pytest.skip("takes minutes in Triton's interpreter")
    rows, vocabulary = 2**16 + 3, 2**15 + 5
    hidden = torch.zeros(rows, 1, device=device)
    hidden[-1] = 1
    hidden.requires_grad_()
    weight = torch.zeros(vocabulary, 1, device=device)
    weight[-1] = 5
    weight.requires_grad_()
    targets = torch.full((rows,), vocabulary - 1, device=device)
    logprobs, entropy, best = linear_logprob(hidden, weight, targets, statistics=True, backend=backend)
    expected = torch.full((rows,), -float(torch.tensor(float(vocabulary)).log()), device=device)
    last = (5 * torch.eye(vocabulary, dtype=torch.float64)[-1]).log_softmax(-1)
    expected[-1] = last[-1]
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy[-1].cpu(), -(last.exp() * last).sum().float())
    assert best[-1] == vocabulary - 1
    assert (best[:-1] == 0).all()
    grads = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    torch.testing.assert_close(grads[0][-1].cpu(), torch.tensor([5 - 5 * last[-1].exp()]).float())
    torch.testing.assert_close(grads[0][0].cpu(), torch.tensor([5 - 5 / vocabulary]))
    torch.testing.assert_close(grads[1][-1].cpu(), torch.tensor([1 - last[-1].exp()]).float())


# Memory

MEASURE = """
import sys
import torch
from dph_kernels import linear_logprob

rows, width, vocabulary, dtype, backend = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:]
dtype = getattr(torch, dtype)
torch.set_num_threads(2)

def make(rows, vocabulary):
    hidden, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (rows, vocabulary))
    return hidden, weight, torch.randint(vocabulary, (rows,)), torch.randn(rows)

def step(hidden, weight, targets, grad):
    linear_logprob(hidden, weight, targets, statistics=True, backend=backend)[0].backward(grad)

def peak():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

step(*make(100, 300))  # code and threads are there from now on
given = make(rows, vocabulary)
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")  # the peak is what is used now
before = peak()
step(*given)
print(peak() - before, sum(x.grad.numel() * x.grad.element_size() for x in given[:2]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        ("float32", (8192, 64, 16384)),
        ("bfloat16", (16384, 64, 8192)),
        ("float32", (256, 768, 50272)),
        ("bfloat16", (6000, 768, 1024)),  # more rows than may have fp32 sums of their gradient
    ],
)
@pytest.mark.parametrize(("device", "backend"), NATIVE)
def test_extra_memory_on_the_cpu_is_below_64_megabytes(device, backend, dtype, size):
    """Beside both gradients; all logits would take up to 537 MB."""
    command = [sys.executable, "-c", MEASURE, *map(str, size), dtype, backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    extra, gradients = map(int, done.stdout.split())
    assert gradients < extra < gradients + 64e6


@pytest.mark.gpu
def test_extra_memory_on_the_gpu_is_below_300_megabytes():
    hidden, weight, targets = make(16384, 768, 50272, torch.bfloat16, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_logprob(hidden, weight, targets, statistics=True, backend="triton")[0].sum().backward()
    gradients = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before < gradients + 300e6
