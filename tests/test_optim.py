"""LaProp against the paper's code and against its equations in fp64; mixed precision, groups and the schedule."""

import copy
import math
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import dph
from dph.optim import LaProp, gradient_norm, param_groups, warmup_cosine

GOLDEN = Path(__file__).parents[1] / "../shared/golden/laprop.safetensors"
SETTINGS = {
    "plain": {},
    "weight_decay": {"weight_decay": 0.1},
    "prior_decay": {"prior_decay": 0.5},
    "both": {"weight_decay": 0.1, "prior_decay": 0.5},
}
RATES = [0.01, 0.02, 0.03, 0.0, 0.0, 0.03, 0.01]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two(dtype=torch.float32):
    return [nn.Parameter(numbers(5, 3, seed=i).to(dtype)) for i in range(2)]


def run(optimiser, params, steps, first=0):
    """Steps with the rates of RATES; the gradient of parameter i at a step is fixed."""
    for step in range(first, first + steps):
        for group in optimiser.param_groups:
            group["lr"] = RATES[step % len(RATES)]
        for i, p in enumerate(params):
            p.grad = numbers(*p.shape, seed=100 * step + i).to(p.dtype)
        optimiser.step()


def by_the_book(theta, steps, weight_decay=0.0, prior_decay=0.0, seed=0, beta1=0.9, beta2=0.95, eps=1e-8):
    """The paper's LaProp, line by line, in fp64."""
    theta = theta.double()
    prior, m, v, a = theta.clone(), torch.zeros_like(theta), torch.zeros_like(theta), 0.0
    for t in range(1, steps + 1):
        eta, g = RATES[(t - 1) % len(RATES)], numbers(*theta.shape, seed=100 * (t - 1) + seed).double()
        v = beta2 * v + (1 - beta2) * g**2
        m = beta1 * m + (1 - beta1) * eta * g / (v.sqrt() + eps) * math.sqrt(1 - beta2**t)
        a = beta1 * a + (1 - beta1) * eta
        c = a / eta if eta else 1.0
        theta = theta - prior_decay * eta * (theta - prior) - weight_decay * eta * theta
        theta = theta - m / c
    return theta


@pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/golden, the paper's own numbers")
@pytest.mark.parametrize("tag", ["plain", "weight_decay", "prior_decay"])
def test_paper_code(tag):
    from safetensors.torch import load_file

    golden = load_file(GOLDEN)
    params = [golden[f"param{i}.initial"].clone().requires_grad_() for i in range(3)]
    rates = golden["lr"].tolist()
    optimiser = LaProp(params, lr=rates[0], **SETTINGS[tag])
    for step, rate in enumerate(rates):
        optimiser.param_groups[0]["lr"] = rate
        for i, p in enumerate(params):
            p.grad = golden[f"param{i}.grad.step{step}"].clone()
        optimiser.step()
        for i, p in enumerate(params):
            torch.testing.assert_close(p.detach(), golden[f"{tag}.param{i}.step{step}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("tag", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equations(tag, dtype):
    start = numbers(7, 5, seed=9)
    p = nn.Parameter(start.to(dtype, copy=True))
    optimiser = LaProp([p], lr=1.0, **SETTINGS[tag])
    run(optimiser, [p], 12)
    want = by_the_book(start, 12, **SETTINGS[tag])
    torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


def test_zero_rate_from_the_start_moves_nothing():
    p = nn.Parameter(numbers(4))
    before = p.detach().clone()
    optimiser = LaProp([p], lr=0.0, prior_decay=0.5, weight_decay=0.1)
    p.grad = numbers(4, seed=1)
    optimiser.step()
    assert torch.equal(p, before)


def test_prior_pulls_back_without_gradient_signal():
    p = nn.Parameter(torch.zeros(3))
    optimiser = LaProp([p], lr=0.1, prior_decay=0.5)
    p.data.fill_(1.0)  # away from the prior, which is zero
    for _ in range(50):
        p.grad = torch.zeros(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a parameter that is away from its prior
            optimiser.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), (1 - 0.5 * 0.1) ** 50))


def test_parameter_without_gradient_is_left_alone():
    p, q = nn.Parameter(numbers(3)), nn.Parameter(numbers(3, seed=1))
    optimiser = LaProp([p, q], lr=0.1, prior_decay=0.5)
    before, state = q.detach().clone(), {k: v.clone() for k, v in optimiser.state[q].items() if k != "step"}
    assert "prior" in state
    p.grad = numbers(3, seed=2)
    optimiser.step()
    assert torch.equal(q, before)
    assert all(torch.equal(optimiser.state[q][k], v) for k, v in state.items())
    assert not torch.equal(p, numbers(3))


def test_no_prior_is_kept_where_there_is_no_prior_decay():
    p = nn.Parameter(numbers(3))
    optimiser = LaProp([p], lr=0.1)
    assert "prior" not in optimiser.state[p]
    optimiser.param_groups[0]["prior_decay"] = 0.5
    p.grad = numbers(3)
    with pytest.raises(ValueError, match="prior_decay: was 0 when the optimizer was built"):
        optimiser.step()


def test_grad_scale_is_read_from_the_tensor():
    params = [nn.Parameter(numbers(300, seed=i)) for i in range(2)]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    one, two = LaProp(params, lr=0.1), LaProp(others, lr=0.1)
    for a, b in zip(params, others, strict=True):
        a.grad = numbers(300, seed=7)
        b.grad = a.grad * 0.125
    one.step(grad_scale=torch.tensor([0.125]))
    two.step()
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_closure():
    p = nn.Parameter(torch.ones(2))
    optimiser = LaProp([p], lr=0.1)

    def closure():
        optimiser.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimiser.step(closure)
    assert optimiser.step(closure) < first


def test_expanded_and_transposed_gradients():
    p, q = nn.Parameter(numbers(4, 6)), nn.Parameter(numbers(4, 6))
    one, two = LaProp([p], lr=0.1), LaProp([q], lr=0.1)
    p.grad = numbers(6, 4).t()
    q.grad = numbers(6, 4).t().contiguous()
    one.step()
    two.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_have_fp32_masters(dtype):
    start = numbers(64, seed=3).to(dtype)
    p = nn.Parameter(start.clone())
    optimiser = LaProp([p], lr=1.0, prior_decay=0.5)
    assert {t.dtype for key, t in optimiser.state[p].items() if key != "step"} == {torch.float32}
    for _ in range(400):  # each step alone is below the spacing of both
        optimiser.param_groups[0]["lr"] = 1e-5
        p.grad = torch.ones_like(p)
        optimiser.step()
    master = optimiser.state[p]["master"]
    assert torch.equal(p, master.to(dtype))
    moved = start.float() - master
    assert moved.min() > 3e-3
    assert (start.float() - p.float()).max() > 3e-3


def test_mixed_precision_keeps_the_fp32_weights():
    start = numbers(50, seed=4)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    low, high = LaProp([p], lr=0.1, prior_decay=0.5), LaProp([q], lr=0.1, prior_decay=0.5)
    low.to_mixed_precision(torch.bfloat16)
    assert p.dtype == torch.bfloat16
    (p * torch.ones(50).bfloat16()).sum().backward()
    assert p.grad.dtype == torch.float32  # accumulated in fp32 over micro-batches
    low.zero_grad()
    low.accumulate_in_fp32(enabled=False)
    (p * torch.ones(50).bfloat16()).sum().backward()
    assert p.grad.dtype == torch.bfloat16  # of a single micro-batch
    low.zero_grad()
    low.accumulate_in_fp32(enabled=True)
    high.accumulate_in_fp32(enabled=False)  # has no masters
    for step in range(3):
        p.grad, q.grad = numbers(50, seed=step), numbers(50, seed=step)
        low.step()
        high.step()
        assert torch.equal(p, low.state[p]["master"].bfloat16())
    low.to_full_precision()
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert "master" not in low.state[p]


def test_the_rate_may_be_a_tensor():
    params, others = two(), two()
    one, other = LaProp(params, lr=torch.tensor(1.0, dtype=torch.float64)), LaProp(others, lr=1.0)
    rate = one.param_groups[0]["lr"]
    for step, value in enumerate(RATES):
        rate.fill_(value)
        other.param_groups[0]["lr"] = value
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = q.grad = numbers(5, 3, seed=10 * step + i)
        one.step()
        other.step()
    assert all(map(torch.equal, params, others))
    saved = copy.deepcopy(one.state_dict())
    rate.fill_(0.5)
    one.load_state_dict(saved)
    assert one.param_groups[0]["lr"] is rate, "a CUDA graph may read it"
    assert rate == RATES[-1]
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == RATES[-1]
    assert isinstance(other.param_groups[0]["lr"], float)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype):
    """Neither weights nor state nor the step count: later steps equal those of a run without it."""
    params, others = two(dtype), two(dtype)
    one, other = LaProp(params, lr=1.0, **SETTINGS["both"]), LaProp(others, lr=1.0, **SETTINGS["both"])
    run(one, params, 3)
    run(other, others, 3)
    params[0].grad, params[1].grad = torch.ones_like(params[0]), torch.full_like(params[1], math.inf)
    before = copy.deepcopy(one.state_dict())
    norm = gradient_norm(params, 1.0)
    one.step(grad_scale=norm.scale)
    assert not norm.finite
    assert all(map(torch.equal, params, others))
    after = one.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, tensors in before["state"].items():
        assert all(torch.equal(value, after["state"][i][key]) for key, value in tensors.items())
    run(one, params, 3, first=3)
    run(other, others, 3, first=3)
    assert all(map(torch.equal, params, others))


@pytest.mark.gpu
def test_a_cuda_graph_captures_clipping_and_step():
    """With bf16 weights, a rate that changes between replays, and a replay whose gradients are not finite."""
    make = lambda: [nn.Parameter(numbers(300, seed=i).bfloat16().cuda()) for i in range(3)]  # noqa: E731
    settings = {**SETTINGS["both"], "prior_dtype": torch.bfloat16}
    params, others = make(), make()
    one, other = LaProp(params, lr=torch.tensor(0.0, device="cuda"), **settings), LaProp(others, lr=0.0, **settings)
    warm = make()
    for p in params + warm:
        p.grad = torch.zeros_like(p)
    LaProp(warm, lr=0.0, **settings).step(grad_scale=gradient_norm(warm, 1.0).scale)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = gradient_norm(params, 1.0)
        one.step(grad_scale=norm.scale)
    assert one.state_dict()["state"][0]["step"] == 0, "to capture a step is not to take it"
    for step, rate in enumerate(RATES):
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad.copy_(numbers(300, seed=10 * step + i))
            if step == 2:
                p.grad[7] = math.inf
            q.grad = p.grad.clone()
        one.param_groups[0]["lr"].fill_(rate)
        other.param_groups[0]["lr"] = torch.tensor(rate, device="cuda").item()
        graph.replay()
        assert norm.finite.item() == (step != 2)
        other.step(grad_scale=gradient_norm(others, 1.0).scale)
        assert all(map(torch.equal, params, others))
    assert one.state_dict()["state"][0]["step"] == len(RATES) - 1


def test_a_group_in_two_precisions_counts_each_step_once():
    """One optimizer over fp32, bf16 and fp64 parameters, and one for each of them."""
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    params, others = ([nn.Parameter(numbers(6, seed=1).to(kind)) for kind in kinds] for _ in range(2))
    run(LaProp(params, lr=1.0, prior_decay=0.5), params, 6)
    apart = [LaProp([p], lr=1.0, prior_decay=0.5) for p in others]
    for step in range(6):
        for i, (p, optimiser) in enumerate(zip(others, apart, strict=True)):
            optimiser.param_groups[0]["lr"] = RATES[step]
            p.grad = numbers(6, seed=100 * step + i).to(p.dtype)
            optimiser.step()
    assert all(map(torch.equal, params, others))


@pytest.mark.filterwarnings("ignore:LaProp. 1 of 1 parameters differ")  # a prior set by hand
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prior_in_bfloat16(dtype):
    """Only the anchor is rounded, and a resumed run has the same anchor."""
    start = numbers(5, 3, seed=8).to(dtype)
    low, high = (nn.Parameter(start.clone()) for _ in range(2))
    one = LaProp([low], lr=1.0, prior_decay=0.5, prior_dtype=torch.bfloat16)
    other = LaProp([high], lr=1.0, prior_decay=0.5)
    assert torch.equal(one.state[low]["prior"], start.bfloat16())
    other.state[high]["prior"] = start.bfloat16().float()
    run(one, [low], 4)
    run(other, [high], 4)
    assert torch.equal(low, high)
    resumed = LaProp([nn.Parameter(low.detach().clone())], lr=1.0, prior_decay=0.5)
    resumed.load_state_dict(one.state_dict())
    (p,) = resumed.param_groups[0]["params"]
    assert resumed.state[p]["prior"].dtype == torch.bfloat16
    assert resumed.param_groups[0]["prior_dtype"] == "bfloat16"


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.layer = nn.Linear(3, 3)
        self.input_norm = nn.LayerNorm(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def test_param_groups():
    model = Named()
    decayed, plain = param_groups(model, weight_decay=0.1, prior_decay=0.5)
    ids = lambda group: {id(p) for p in group["params"]}  # noqa: E731
    assert ids(decayed) == {id(model.layer.weight)}
    assert ids(plain) == {
        id(p) for p in (model.embedding.weight, model.layer.bias, model.input_norm.weight, model.input_norm.bias)
    }
    assert (decayed["weight_decay"], decayed["prior_decay"]) == (0.1, 0.5)
    assert (plain["weight_decay"], plain["prior_decay"]) == (0.0, 0.0)
    assert sum(len(g["params"]) for g in (decayed, plain)) == 5  # the tied one once
    assert decayed["param_names"] == ["layer.weight"]
    assert plain["param_names"] == ["embedding.weight", "layer.bias", "input_norm.weight", "input_norm.bias"]
    (everything,) = param_groups(model, prior_decay=0.5, no_decay=())
    assert len(everything["params"]) == 5


def test_param_groups_of_the_model():
    """Every LayerNorm's name contains "norm", the token embedding's "embedding" (DESIGN.md, public names)."""
    model = dph.Model(dph.ModelConfig(vocab_size=16, embedding_size=4, hidden_size=8, intermediate_size=8,
                                      num_hidden_layers=1, num_attention_heads=2))  # fmt: skip
    decayed, plain = param_groups(model, prior_decay=0.5)
    owners = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), module)  # the tied one is the embedding's
    assert all(isinstance(owners[id(p)], nn.Linear) and p.ndim == 2 for p in decayed["params"])
    assert all(isinstance(owners[id(p)], nn.LayerNorm | nn.Embedding) or p.ndim == 1 for p in plain["params"])


def test_gradient_norm_is_exact_and_takes_odd_shapes():
    sizes = [(0,), (1,), (1023,), (1024,), (1025,), (3, 700, 5)]
    params = [nn.Parameter(torch.zeros(s)) for s in sizes] + [nn.Parameter(torch.zeros(2))]
    for i, p in enumerate(params[:-1]):
        p.grad = numbers(*p.shape, seed=i) * 10**i
    want = torch.cat([p.grad.flatten().double() for p in params[:-1]]).norm()
    torch.testing.assert_close(gradient_norm(params).norm, want, rtol=1e-13, atol=0)
    assert gradient_norm([nn.Parameter(torch.zeros(2))]).norm == 0
    assert gradient_norm(params[4]).norm == gradient_norm([params[4]]).norm > 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_norm_tells_of_what_is_not_finite(bad):
    p = nn.Parameter(torch.zeros(3000))
    p.grad = torch.zeros(3000)
    p.grad[1500] = bad
    norm, scale, finite = gradient_norm([p])
    assert not torch.isfinite(norm)
    assert scale.isnan()
    assert not finite


def test_clipping_equals_pytorchs():
    for scale in (0.01, 100.0):
        p, q = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))
        p.grad = numbers(50) * scale
        q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_([q], 1.0)
        torch.testing.assert_close(p.grad * gradient_norm([p], 1.0).scale, q.grad)


def test_schedule():
    lr = lambda step: warmup_cosine(step, peak=3e-6, warmup=200, total=23040, final=3e-7)  # noqa: E731
    assert lr(1) == pytest.approx(3e-6 / 200)
    assert lr(100) == pytest.approx(1.5e-6)
    assert lr(200) == 3e-6
    assert lr((200 + 23040) // 2) == pytest.approx((3e-6 + 3e-7) / 2)
    assert lr(23040) == pytest.approx(3e-7)
    assert lr(99999) == pytest.approx(3e-7)
    assert all(lr(s) > lr(s + 1) for s in range(200, 23040, 777))
    assert warmup_cosine(1, peak=1.0, warmup=0, total=1) == 0.0
    with pytest.raises(ValueError, match="step: expected 1 <= step"):
        lr(0)


WRONG_SETTINGS = [
    ("lr", "1e-3", TypeError, "expected a number, got '1e-3' of type str"),
    ("lr", True, TypeError, "expected a number, got True of type bool"),
    ("lr", None, TypeError, "expected a number, got None"),
    ("lr", -1.0, ValueError, r"expected a number in \[0, inf\), got -1.0"),
    ("lr", math.nan, ValueError, "expected a number in .*, got nan"),
    ("lr", math.inf, ValueError, "expected a number in .*, got inf"),
    pytest.param("lr", 10**400, ValueError, "expected a number in .*, got 1000.*000$", id="huge"),
    ("lr", torch.tensor(math.nan), ValueError, "expected a number in .*, got nan"),
    ("lr", torch.tensor(1), ValueError, "expected float32 or float64, got int64"),
    ("lr", torch.ones(2), ValueError, r"expected shape \[1\], got \[2\]"),
    ("betas", 0.9, TypeError, "expected two numbers, got 0.9 of type float"),
    ("betas", "09", TypeError, "expected two numbers, got '09' of type str"),
    ("betas", (0.9,), ValueError, "expected two numbers, got 1: "),
    ("betas", (0.9, 0.9, 0.9), ValueError, "expected two numbers, got 3: "),
    ("betas", (0.9, 1.0), ValueError, r"\[1\]: expected a number in \[0, 1\), got 1.0"),
    ("betas", ("0.9", 0.95), TypeError, r"\[0\]: expected a number, got '0.9' of type str"),
    ("eps", -1e-8, ValueError, "expected a number in "),
    ("eps", "1e-8", TypeError, "expected a number, got "),
    ("weight_decay", math.nan, ValueError, "expected a number in "),
    ("weight_decay", math.inf, ValueError, "expected a number in "),
    ("weight_decay", [0.1], TypeError, "expected a number, got "),
    ("prior_decay", -0.5, ValueError, "expected a number in "),
    ("prior_decay", torch.tensor(0.5), TypeError, "expected a number, got tensor.* of type Tensor"),
]


@pytest.mark.parametrize(("key", "value", "error", "message"), WRONG_SETTINGS)
def test_wrong_settings(key, value, error, message):
    """In the constructor, a group, a later group, and when a scheduler writes them: refused before anything changes."""
    key_and_message = f"{key}(: )?{message}"
    with pytest.raises(error, match=f"^{key_and_message}"):
        LaProp([nn.Parameter(torch.zeros(2))], **{"lr": 0.1, key: value})
    with pytest.raises(error, match=rf"^param_groups\[0\]: {key_and_message}"):
        LaProp([{"params": [nn.Parameter(torch.zeros(2))], key: value}], lr=0.1)
    params = two()
    optimiser = LaProp([params[0]], lr=0.1, prior_decay=0.5)
    with pytest.raises(error, match=rf"^param_groups\[1\]: {key_and_message}"):
        optimiser.add_param_group({"params": [params[1]], key: value})
    optimiser.add_param_group({"params": [params[1]]})
    before = [p.detach().clone() for p in params]
    optimiser.param_groups[1][key] = value
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(error, match=rf"^param_groups\[1\]: {key_and_message}"):
        optimiser.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize(
    ("value", "error"), [(torch.float16, ValueError), ("float16", ValueError), (16, TypeError), (None, TypeError)]
)
def test_wrong_prior_dtypes(value, error):
    with pytest.raises(error, match=r"^prior_dtype: expected torch\.float32 or torch\.bfloat16, got "):
        LaProp([nn.Parameter(torch.zeros(2))], lr=0.1, prior_dtype=value)


@pytest.mark.parametrize("rate", [1, numpy.float32(0.5), numpy.float64(0.5)])
def test_numbers_of_other_types(rate):
    """A scheduler may write them."""
    p, q = (nn.Parameter(numbers(3)) for _ in range(2))
    one, other = LaProp([p], lr=rate), LaProp([q], lr=float(rate))
    p.grad = q.grad = torch.ones(3)
    one.step()
    other.step()
    assert torch.equal(p, q)


def test_a_schedulers_bad_rate_is_refused():
    p = nn.Parameter(numbers(3))
    optimiser = LaProp([p], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: (1.0, math.nan)[step])
    p.grad = torch.ones(3)
    optimiser.step()
    scheduler.step()
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr: expected a number in .*, got nan"):
        optimiser.step()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: torch.zeros(2, dtype=torch.complex64),
            TypeError,
            "expected one of .*torch.float64, got torch.complex64",
        ),
        (lambda: torch.zeros(2, dtype=torch.int64), TypeError, "expected one of .*, got torch.int64"),
        (lambda: torch.eye(2).to_sparse(), ValueError, "expected a dense tensor, got one in torch.sparse_coo"),
        (lambda: torch.zeros(2, 3).t(), ValueError, r"expected a contiguous tensor of shape \[3, 2\], got strides"),
        (
            torch.inference_mode()(lambda: torch.zeros(2)),
            ValueError,
            "expected a tensor made outside of torch.inference",
        ),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused(make, error, message):
    optimiser = LaProp([("a", nn.Parameter(torch.zeros(2)))], lr=0.1)
    group = {"params": [("b", nn.Parameter(torch.zeros(2))), ("c", make())]}
    with pytest.raises(error, match=rf"^param_groups\[1\]: params\[1\] \('c'\): {message}"):
        optimiser.add_param_group(group)
    assert len(optimiser.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice_is_refused():
    """It would be updated twice in one launch."""
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"params\[1\]: expected every parameter once, got the one of params\[0\] again"
    ):
        LaProp([p, p], lr=0.1)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a"], ValueError, "param_names: expected 2 names, got 1"),
        (["a", 5], TypeError, r"param_names\[1\]: expected a name, got 5"),
        (3, TypeError, "param_names: expected a list of names, got 3"),
        ("ab", TypeError, "param_names: expected a list of names, got 'ab'"),
    ],
)
def test_names_must_fit_the_parameters(names, error, message):
    with pytest.raises(error, match=rf"^param_groups\[0\]: {message}"):
        LaProp([{"params": two(), "param_names": names}], lr=0.1)


def test_sparse_gradients_are_refused():
    module = nn.Embedding(5, 3, sparse=True)
    optimiser = LaProp(module.named_parameters(), lr=0.1)
    module(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"params\[0\] \('weight'\): expected a dense gradient, got one in torch.sparse_coo"
    ):
        optimiser.step()
    with pytest.raises(ValueError, match=r"grads: expected dense gradients, got one in torch\.sparse_coo"):
        gradient_norm(module.parameters())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0.5, TypeError, "expected a float32 tensor of one element, got 0.5 of type float"),
        (torch.ones(2), ValueError, r"expected shape \[1\], got \[2\]"),
        (torch.ones(1, dtype=torch.float64), ValueError, "expected float32, got float64"),
        (torch.ones(1, device="meta"), ValueError, "expected a tensor on cpu, got one on meta"),
    ],
)
def test_wrong_grad_scale(value, error, message):
    p = nn.Parameter(numbers(3))
    p.grad = torch.ones(3)
    optimiser = LaProp([p], lr=0.1)
    with pytest.raises(error, match=f"^grad_scale: {message}"):
        optimiser.step(grad_scale=value)
    assert torch.equal(p, numbers(3))


def test_other_wrong_arguments():
    p = nn.Parameter(numbers(3))
    with pytest.raises(TypeError, match="closure: expected a function without arguments, got Tensor"):
        LaProp([p], lr=0.1).step(torch.ones(1))
    with pytest.raises(TypeError, match="limit: expected a number, got '1' of type str"):
        gradient_norm([p], "1")
    with pytest.raises(ValueError, match=r"limit: expected 0\.0 <= limit <= inf, got nan"):
        gradient_norm([p], math.nan)
    with pytest.raises(TypeError, match="no_decay: expected a list of words, got the string 'norm'"):
        param_groups(Named(), no_decay="norm")
