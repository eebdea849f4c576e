"""swiglu_reward: every backend against plain PyTorch in the same precision and in fp64."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.numerics import implementations, skip_where_unsupported, strange_nans
from helpers.poolers import POOLERS, SIZES, compare, eager, make

from dph_kernels import dispatch
from dph_kernels.swiglu_reward import swiglu_reward

ROOT = Path(__file__).resolve().parents[2]

reference = importlib.import_module("dph_kernels.swiglu_reward.reference")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = implementations("swiglu_reward")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size, pooler, device, backend, dtype):
    skip_where_unsupported("swiglu_reward", device, backend, dtype)
    compare(make(*size, pooler, dtype, device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize(("dropout", "input_dropout"), [(0.1, 0.0), (0.0, 0.3), (0.5, 0.2)])
def test_dropout_is_replayed_in_the_backward_pass(dropout, input_dropout, pooler, device, backend, dtype):
    skip_where_unsupported("swiglu_reward", device, backend, dtype)
    rows = torch.randint(-(2**40), 2**40, (33,), device=device)
    options = {"dropout": dropout, "input_dropout": input_dropout, "seed": -(2**62) + 5, "row_ids": rows}
    compare(make(33, 65, 17, 2, pooler, dtype, device), backend, **options)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("biases", [(), ("b1",), ("b2",)])
def test_biases_are_optional(biases, device, backend):
    inputs = make(5, 8, 6, 2, device=device)
    compare({name: x for name, x in inputs.items() if name not in ("b1", "b2") or name in biases}, backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_a_row_is_scored_alike_in_any_batch(device, backend):
    inputs = make(64, 33, 17, 2, device=device)
    rows = torch.arange(64, device=device) + 100
    options = {"dropout": 0.5, "input_dropout": 0.2, "seed": 3, "backend": backend}
    whole = swiglu_reward(**inputs, **options, row_ids=rows)
    some = torch.tensor([63, 7, 7], device=device)
    part = swiglu_reward(**{**inputs, "hidden": inputs["hidden"][some]}, **options, row_ids=rows[some])
    torch.testing.assert_close(part, whole[some])
    assert not torch.allclose(swiglu_reward(**inputs, **{**options, "seed": 4}, row_ids=rows), whole)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_row_ids_count_from_zero_by_default(device, backend):
    inputs = make(9, 16, 8, 1, device=device)
    options = {"dropout": 0.5, "seed": 1, "backend": backend}
    numbered = swiglu_reward(**inputs, **options, row_ids=torch.arange(9, device=device))
    assert torch.equal(swiglu_reward(**inputs, **options), numbered)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_both_dropouts_are_drawn_apart(device, backend):
    """With the identity pooler both masks multiply; were they the same, half of the columns would survive, not 1/4."""
    hidden, reward = torch.ones(64, 257, device=device), torch.ones(1, 257, device=device)
    rewards = swiglu_reward(hidden, reward, dropout=0.5, input_dropout=0.5, backend=backend)
    assert abs(rewards.mean().item() / 4 / 257 - 0.25) < 0.02


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_strides(layout, device, backend):
    inputs = {name: x.detach() for name, x in make(32, 34, 16, 2, device=device).items()}
    if layout == "transposed":
        inputs = {name: x.T.contiguous().T for name, x in inputs.items() if x.dim() == 2}
    elif layout == "strided":
        inputs = {name: x.repeat_interleave(2, -1)[..., ::2] for name, x in inputs.items()}
    else:
        inputs = {name: x[..., :1].expand(x.shape) for name, x in inputs.items()}
    compare({name: x.requires_grad_() for name, x in inputs.items()}, backend, dropout=0.2)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("kind", ["expanded", "strided", "transposed"])
def test_any_upstream_gradient(kind, device, backend):
    grad = {
        "expanded": torch.tensor(0.7, device=device).expand(33, 2),
        "strided": torch.randn(66, 4, device=device)[::2, ::2],
        "transposed": torch.randn(2, 33, device=device).T,
    }[kind]
    compare(make(33, 16, 8, 2, device=device), backend, grad)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pooler", POOLERS)
def test_no_rows(pooler, device, backend):
    inputs = make(0, 8, 6, 2, pooler, device=device)
    rewards = swiglu_reward(**inputs, dropout=0.5, backend=backend)
    assert rewards.shape == (0, 2)
    rewards.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs.values())


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_saturated_pooler(scale, device, backend):
    inputs = {name: x.detach().mul(scale).requires_grad_() for name, x in make(5, 8, 6, 2, device=device).items()}
    compare(inputs, backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("nan", strange_nans())
def test_nan_is_not_hidden(nan, device, backend):
    inputs = make(3, 8, 6, 2, device=device)
    with torch.no_grad():
        inputs["hidden"][1, 2] = nan
        assert swiglu_reward(**inputs, backend=backend).isnan().any(1).tolist() == [False, True, False]
        inputs = make(3, 8, 6, 2, device=device)
        inputs["b2"][3] = nan
        assert swiglu_reward(**inputs, backend=backend).isnan().all()


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype, device, backend):
    inputs = make(5, 8, 6, 2, device=device)
    options = {"dropout": 0.3, "seed": 7, "backend": backend}
    want = swiglu_reward(**inputs, **options)
    grads = torch.autograd.grad(want.sum(), list(inputs.values()))
    try:
        torch.set_default_dtype(dtype)
        got = swiglu_reward(**inputs, **options)
        again = torch.autograd.grad(got.sum(), list(inputs.values()))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
@pytest.mark.skipif(dispatch.missing("swiglu_reward", "cpu", "cpu") is not None, reason="the C++ module is not built")
def test_out_of_memory_is_an_error():
    code = """if True:
        import resource
        import torch
        from dph_kernels import swiglu_reward
        hidden, reward, w2 = torch.zeros(1, 8).expand(20_000_000, 8), torch.zeros(1, 8), torch.zeros(8, 8)
        swiglu_reward(hidden[:5], reward, w2=w2, backend="cpu")
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
        try:
            swiglu_reward(hidden, reward, w2=w2, backend="cpu")
        except (MemoryError, RuntimeError):
            print("no memory")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "no memory", done.stderr


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(pooler, device, backend):
    inputs = make(33, 65, 17, 2, pooler, device=device)
    rewards = swiglu_reward(**inputs, dropout=0.1, backend=backend)
    rewards.sum().backward()
    assert rewards.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize("trained", ["hidden", "reward", "w1", "b1", "w2", "b2"])
def test_only_the_gradients_asked_for_are_computed(trained, monkeypatch):
    computed = []
    original = reference.gradients

    def spy(*args):
        for argument, value in original(*args):
            computed.append(argument)
            yield argument, value

    inputs = make(5, 8, 6, 2)
    expected = dict(zip(inputs, torch.autograd.grad(eager(**inputs).sum(), inputs.values()), strict=True))
    monkeypatch.setattr(reference, "gradients", spy)
    for name, x in inputs.items():
        x.requires_grad_(name == trained)
    swiglu_reward(**inputs, backend="reference").sum().backward()
    assert computed == [list(inputs).index(trained)]
    torch.testing.assert_close(inputs[trained].grad, expected[trained])
    assert all(x.grad is None for name, x in inputs.items() if name != trained)


def test_nothing_is_saved_without_gradients(monkeypatch):
    saved = []
    original = reference.forward

    def spy(**inputs):
        saved.append(inputs["save"])
        return original(**inputs)

    monkeypatch.setattr(reference, "forward", spy)
    inputs = make(5, 8, 6, 2)
    trained = swiglu_reward(**inputs, backend="reference")
    with torch.no_grad():
        scored = swiglu_reward(**inputs, backend="reference")
    assert saved == [True, False]
    assert torch.equal(trained, scored)


@pytest.mark.parametrize("pooler", POOLERS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(pooler, dropout):
    inputs = make(3, 4, 5, 2, pooler, torch.float64)
    options = {"dropout": dropout, "input_dropout": dropout}

    def call(*values):
        return swiglu_reward(**dict(zip(inputs, values, strict=True)), **options)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_the_bare_operator_refuses_to_lose_gradients():
    inputs = make(5, 8, 6, 2)
    with pytest.raises(ValueError, match="save: expected True if a gradient is needed, got False"):
        torch.ops.dph.swiglu_reward(*inputs.values(), None, 0.0, 0.0, 0, False, "auto")


def test_compiles_as_one_graph_for_every_seed():
    inputs = make(5, 8, 6, 2)

    def loss(seed, *values):
        return swiglu_reward(**dict(zip(inputs, values, strict=True)), dropout=0.3, seed=seed).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seed in (3, 4, 5, 2**40):
        expected = torch.autograd.grad(loss(seed, *inputs.values()), inputs.values())
        got = torch.autograd.grad(compiled(seed, *inputs.values()), inputs.values())
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(5)}, r"hidden: expected shape \[R, C\], got \[5\]"),
        ({"hidden": torch.zeros(5, 8, dtype=torch.int64)}, "hidden: expected float16 or .*float64, got int64"),
        ({"reward": torch.zeros(8)}, r"reward: expected shape \[K, 8\], got \[8\]"),
        ({"reward": torch.zeros(2, 8).double()}, "reward: expected float32, got float64"),
        ({"reward": torch.zeros(2, 8, device="meta")}, "reward: expected a tensor on cpu, got one on meta"),
        ({"w1": torch.zeros(12, 7)}, r"w1: expected shape \[2F, 8\], got \[12, 7\]"),
        ({"w1": torch.zeros(13, 8)}, r"w1: expected an even, positive number of rows \(\[x \| gate\], 2F\), got 13"),
        ({"w1": torch.zeros(12, 8).half()}, "w1: expected float32, got float16"),
        ({"w1": None}, "b1: expected None if w1 is None, got a tensor"),
        ({"w1": None, "b1": None}, r"w2: expected shape \[8, 8\], got \[8, 6\]"),
        ({"w2": None, "b2": None}, r"w2: expected a tensor \[C, F\] with w1, got None"),
        ({"w2": None}, "b2: expected None if w2 is None, got a tensor"),
        ({"reward": torch.zeros(0, 8)}, r"reward: expected at least one reward vector \(K >= 1\), got shape \[0, 8\]"),
        ({"w2": torch.zeros(8, 7)}, r"w2: expected shape \[8, 6\], got \[8, 7\]"),
        ({"b1": torch.zeros(6)}, r"b1: expected shape \[12\], got \[6\]"),
        ({"b2": torch.zeros(8, device="meta")}, "b2: expected a tensor on cpu, got one on meta"),
        ({"dropout": 1.0}, r"dropout: expected 0.0 <= dropout < 1.0, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected .*, got -0.1"),
        ({"input_dropout": float("nan")}, "input_dropout: expected .*, got nan"),
        ({"seed": 2**63}, "seed: expected .*, got 9223372036854775808"),
        ({"row_ids": torch.arange(4)}, r"row_ids: expected shape \[5\], got \[4\]"),
        ({"row_ids": torch.arange(5, dtype=torch.int32)}, "row_ids: expected int64, got int32"),
        ({"row_ids": torch.arange(5, device="meta")}, "row_ids: expected a tensor on cpu, got one on meta"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    inputs = {name: x.detach() for name, x in make(5, 8, 6, 2).items()}
    with pytest.raises(ValueError, match=message):
        swiglu_reward(**{**inputs, **change})


def test_a_backend_that_cannot_run_says_why():
    inputs = make(5, 8, 6, 2)
    with pytest.raises(RuntimeError, match=r"swiglu_reward: backend 'cuda' cannot run: .+"):
        swiglu_reward(**inputs, backend="cuda")
