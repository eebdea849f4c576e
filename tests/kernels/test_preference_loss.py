"""preference_loss: every backend against the formulas as the paper prints them, in the same precision and in fp64."""

import itertools

import pytest
import torch
from numerics import assert_close_to_fp64, implementations
from torch.nn.functional import logsigmoid

from dph_kernels.preference_loss import PREFERENCE_METRICS, preference_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = implementations("preference_loss")
LOGPROBS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
NAMES = ("rewards_chosen", "rewards_rejected", *LOGPROBS)
DEFAULTS = {
    "beta": 0.6,
    "dpo_epsilon": 0.25,
    "dph_epsilon": 0.1,
    "objective": "separable",
    "dpo_weight": 1.0,
    "dph_weight": 1.0,
}


def make(pairs, heads=None, dtype=torch.float32, device="cpu", parts=("dph", "dpo")):
    shape = (pairs,) if heads is None else (pairs, heads)
    inputs = dict.fromkeys(NAMES)
    if "dph" in parts:
        inputs.update({name: torch.randn(shape, device=device).mul(3) for name in NAMES[:2]})
    if "dpo" in parts:
        inputs.update({name: torch.randn(pairs, device=device).mul(4).sub(20) for name in LOGPROBS})
    return {name: x if x is None else x.to(dtype).requires_grad_() for name, x in inputs.items()}


def formula(inputs, beta, dpo_epsilon, dph_epsilon, objective, dpo_weight, dph_weight):
    """(loss, metrics by name) as SPEC 3 writes them."""
    r_w, r_l, *logprobs = inputs.values()
    found = {}
    loss = 0.0
    if r_w is not None:
        e = dph_epsilon
        if objective == "separable":
            terms = (1 - e) * logsigmoid(r_w) + e * logsigmoid(-r_w) + e * logsigmoid(r_l) + (1 - e) * logsigmoid(-r_l)
        else:
            terms = (1 - e) * logsigmoid(r_w - r_l) + e * logsigmoid(r_l - r_w)
        found["dph_loss"] = -terms.mean()
        found.update(describe("reward", r_w, r_l))
        loss = loss + dph_weight * found["dph_loss"]
    if logprobs[0] is not None:
        p_w, p_l, f_w, f_l = logprobs
        e, d = dpo_epsilon, beta * ((p_w - p_l) - (f_w - f_l))
        found["dpo_loss"] = -((1 - e) * logsigmoid(d) + e * logsigmoid(-d)).mean()
        found.update(describe("implicit", beta * (p_w - f_w), beta * (p_l - f_l)))
        loss = loss + dpo_weight * found["dpo_loss"]
    return loss, {"loss": loss, **found}


def describe(kind, chosen, rejected):
    return {
        f"{kind}_accuracy": (chosen > rejected).to(chosen.dtype).mean(),
        f"{kind}_margin": (chosen - rejected).mean(),
        f"{kind}_chosen": chosen.mean(),
        f"{kind}_rejected": rejected.mean(),
    }


def as_fp64(inputs):
    return {name: x if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}


def named(metrics):
    return dict(zip(PREFERENCE_METRICS, metrics.tolist(), strict=True))


def compare(inputs, backend, upstream=1.0, **options):
    """Loss, metrics and all gradients of an operator call against the formulas."""
    options = {**DEFAULTS, **options}
    loss, metrics = preference_loss(**inputs, **options, backend=backend)
    same, _ = formula(inputs, **options)
    wide = as_fp64(inputs)
    truth, expected = formula(wide, **options)
    assert not metrics.requires_grad
    assert_close_to_fp64(loss, same, truth, "loss")
    got = named(metrics)
    assert got.pop("finite") == 1.0
    for name, value in got.items():
        wanted = expected[name].item() if name in expected else torch.nan
        assert value == pytest.approx(wanted, rel=1e-5, abs=1e-5, nan_ok=True), name
    given = [name for name, x in inputs.items() if x is not None]
    gradients = zip(
        given,
        torch.autograd.grad(loss * upstream, [inputs[name] for name in given]),
        torch.autograd.grad(same * upstream, [inputs[name] for name in given]),
        torch.autograd.grad(truth * upstream, [wide[name] for name in given]),
        strict=True,
    )
    for name, ours, theirs, true in gradients:
        assert ours.dtype == inputs[name].dtype
        assert_close_to_fp64(ours, theirs, true, f"gradient of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("objective", ["separable", "contrastive"])
@pytest.mark.parametrize("heads", [None, 1, 3])
@pytest.mark.parametrize("pairs", [1, 2, 63, 64, 65, 111, 257])
def test_values_and_gradients(pairs, heads, objective, device, backend, dtype):
    compare(make(pairs, heads, dtype, device), backend, objective=objective)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("parts", [("dph",), ("dpo",)])
def test_either_part_may_be_off(parts, device, backend):
    compare(make(65, device=device, parts=parts), backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("options", [{"dpo_weight": 0.0}, {"dph_weight": 0.0}, {"dpo_weight": 0.3, "dph_weight": 2.0}])
def test_weights(options, device, backend):
    compare(make(65, device=device), backend, **options)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize(("beta", "epsilon"), [*itertools.product((0.0, 0.1, 2.0), (0.0, 0.25, 0.499))])
def test_beta_and_label_smoothing(beta, epsilon, device, backend):
    compare(make(65, device=device), backend, beta=beta, dpo_epsilon=epsilon, dph_epsilon=epsilon)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_the_loss_of_a_sum_is_scaled(device, backend):
    compare(make(65, device=device), backend, upstream=-3.5)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_each_input_keeps_its_dtype(device, backend):
    inputs = make(33, 2, device=device)
    with torch.no_grad():
        mixed = {name: x.to(dtype) for (name, x), dtype in zip(inputs.items(), itertools.cycle(DTYPES), strict=False)}
    mixed = {name: x.requires_grad_() for name, x in mixed.items()}
    loss, metrics = preference_loss(**mixed, backend=backend)
    loss.backward()
    assert loss.dtype == metrics.dtype == torch.float64
    assert loss.item() == pytest.approx(formula(as_fp64(mixed), **DEFAULTS)[0].item(), rel=1e-12)
    assert all(x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in mixed.values())


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("layout", ["strided", "expanded", "transposed"])
def test_any_strides(layout, device, backend):
    inputs = {name: x.detach() for name, x in make(64, 2, device=device).items()}
    if layout == "strided":
        inputs = {name: x[::2] for name, x in inputs.items()}
    elif layout == "expanded":
        inputs = {name: x[:1].expand(x.shape) for name, x in inputs.items()}
    else:
        inputs = {name: x.T.contiguous().T if x.dim() == 2 else x for name, x in inputs.items()}
    compare({name: x.requires_grad_() for name, x in inputs.items()}, backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("objective", ["separable", "contrastive"])
@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_stable_at_ten_thousand(epsilon, objective, device, backend):
    """Exact values: log sigmoid(x) is 0 or x out there."""
    far = torch.tensor([1e4, -1e4, 0.0], device=device)
    chosen, rejected = far.clone().requires_grad_(), (-far).requires_grad_()
    options = {"dph_epsilon": epsilon, "objective": objective}
    loss, _ = preference_loss(chosen, rejected, **options, backend=backend)
    loss.backward()
    expected = 2e4 + 2 * 0.6931471805599453 if objective == "separable" else 2e4 + 0.6931471805599453
    assert loss.item() == pytest.approx(expected / 3, rel=1e-6)
    slopes = torch.tensor([epsilon, epsilon - 1, epsilon - 0.5], device=device) / 3
    torch.testing.assert_close(chosen.grad, slopes)
    torch.testing.assert_close(rejected.grad, -slopes)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_cdpo_is_stable_at_ten_thousand(device, backend):
    inputs = make(3, device=device, parts=("dpo",))
    with torch.no_grad():
        inputs["policy_chosen"].copy_(torch.tensor([1e4, -1e4, 0.0]))
        for name in LOGPROBS[1:]:
            inputs[name].zero_()
    compare(inputs, backend, beta=1.0)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("broken", NAMES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_never_hidden(value, broken, device, backend):
    inputs = {name: x.detach() for name, x in make(5, device=device).items()}
    inputs[broken][2] = value
    loss, metrics = preference_loss(**inputs, backend=backend)
    got = named(metrics)
    assert not loss.isfinite()
    assert got["finite"] == 0.0
    side = broken.rsplit("_", 1)[-1]
    own, other = ("reward", "implicit") if broken.startswith("rewards") else ("implicit", "reward")
    assert not torch.tensor([got["loss"], got[f"{own}_margin"], got[f"{own}_{side}"]]).isfinite().any()
    assert torch.tensor([value for name, value in got.items() if name.startswith(other)]).isfinite().all()
    if value != value:
        assert got[f"{own}_accuracy"] != got[f"{own}_accuracy"]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_a_tie_is_wrong(device, backend):
    same = torch.ones(4, device=device)
    _, metrics = preference_loss(same, same, same, same, same, same, backend=backend)
    assert named(metrics)["reward_accuracy"] == named(metrics)["implicit_accuracy"] == 0.0


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(device, backend):
    inputs = make(65, 3, device=device)
    loss, metrics = preference_loss(**inputs, backend=backend)
    loss.backward()
    assert metrics.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs.values())


@pytest.mark.parametrize("objective", ["separable", "contrastive"])
@pytest.mark.parametrize("heads", [None, 2])
def test_gradcheck(heads, objective):
    inputs = make(4, heads, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: preference_loss(*x, objective=objective)[0], tuple(inputs.values()))


def of_given(inputs, objective):
    """The loss as a function of those inputs that are there, and these."""
    given = {name: x for name, x in inputs.items() if x is not None}

    def loss(*values):
        arguments = {**dict.fromkeys(NAMES), **dict(zip(given, values, strict=True))}
        return preference_loss(**arguments, objective=objective, dpo_weight=0.7, dph_weight=1.3)[0]

    return loss, tuple(given.values())


PARTS = pytest.mark.parametrize("parts", [("dph", "dpo"), ("dph",), ("dpo",)])


@PARTS
@pytest.mark.parametrize("objective", ["separable", "contrastive"])
@pytest.mark.parametrize("heads", [None, 2])
def test_second_derivatives(heads, objective, parts):
    loss, values = of_given(make(3, heads, torch.float64, parts=parts), objective)
    assert torch.autograd.gradgradcheck(loss, values)


@pytest.mark.parametrize("objective", ["separable", "contrastive"])
def test_hessian_is_that_of_the_formulas(objective):
    inputs = make(3, dtype=torch.float64)
    loss, values = of_given(inputs, objective)

    def plain(*values):
        options = {**DEFAULTS, "objective": objective, "dpo_weight": 0.7, "dph_weight": 1.3}
        return formula(dict(zip(NAMES, values, strict=True)), **options)[0]

    hessian = torch.autograd.functional.hessian(loss, values)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(plain, values))
    assert hessian[0][0].diagonal().min() > 0


def test_third_derivatives():
    loss, values = of_given(make(3, dtype=torch.float64), "separable")

    def penalty(*values):
        return sum(g.square().sum() for g in torch.autograd.grad(loss(*values), values, create_graph=True))

    assert torch.autograd.gradgradcheck(penalty, values)


@PARTS
def test_opcheck(parts):
    inputs = make(5, 2, parts=parts)
    options = (0.6, 0.25, 0.1, "separable", 1.0, 0.5, "auto")
    torch.library.opcheck(torch.ops.dph.preference_loss.default, (*inputs.values(), *options))
    for grad in (torch.tensor(1.5), torch.tensor(1.5, requires_grad=True)):
        arguments = (grad, *inputs.values(), *options)
        torch.library.opcheck(torch.ops.dph.preference_loss_backward.default, arguments)


@PARTS
def test_compiles_as_one_graph(parts):
    inputs = {name: x for name, x in make(5, parts=parts).items() if x is not None}

    def run(*values):
        loss, metrics = preference_loss(**{**dict.fromkeys(NAMES), **dict(zip(inputs, values, strict=True))})
        return loss * 2, metrics

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (loss, metrics), (expected, same) = compiled(*inputs.values()), run(*inputs.values())
    torch.testing.assert_close(metrics, same, equal_nan=True)
    grads = [torch.autograd.grad(x, inputs.values()) for x in (loss, expected)]
    torch.testing.assert_close(*grads)


MISSING = "policy_rejected, reference_chosen: expected a tensor, as policy_chosen, .* come together, got None"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards_chosen": torch.zeros(4)}, r"rewards_rejected: expected shape \[4\], got \[5\]"),
        ({"rewards_rejected": torch.zeros(5, 1)}, r"rewards_rejected: expected shape \[5\], got \[5, 1\]"),
        ({"rewards_rejected": None}, "rewards_rejected: expected a tensor, as rewards_chosen, .*, got None"),
        ({"rewards_chosen": torch.zeros(5, dtype=torch.int64)}, "rewards_chosen: expected float16 or .*, got int64"),
        (dict.fromkeys(NAMES[:2], 1.0), "rewards_chosen: expected a tensor, got float"),
        ({"reference_chosen": [1.0]}, "reference_chosen: expected a tensor, got list"),
        ({"rewards_rejected": torch.zeros(5, device="meta")}, "rewards_rejected: expected a tensor on cpu, got one"),
        (dict.fromkeys(NAMES[:2], torch.zeros(5, 2, 1)), r"rewards_chosen: expected shape \[N\] or \[N, K\]"),
        (dict.fromkeys(NAMES[:2], torch.tensor(1.0)), r"rewards_chosen: expected shape \[N\] or \[N, K\], got \[\]"),
        (dict.fromkeys(NAMES[:2], torch.zeros(4)), r"policy_chosen: expected shape \[4\], got \[5\]"),
        (dict.fromkeys(NAMES[:2], torch.zeros(5, device="meta")), "policy_chosen: expected a tensor on meta, got one"),
        (dict.fromkeys(LOGPROBS, torch.zeros(5, 1)), r"policy_chosen: expected shape \[5\], got \[5, 1\]"),
        ({"policy_rejected": None, "reference_chosen": None}, MISSING),
        ({"reference_rejected": torch.zeros(1)}, r"reference_rejected: expected shape \[5\], got \[1\]"),
        (dict.fromkeys(NAMES), "rewards_chosen, policy_chosen: expected at least one part of the objective, got None"),
        (dict.fromkeys(NAMES, torch.zeros(0)), "rewards_chosen: expected at least one pair, .*, got none"),
        (
            {**dict.fromkeys(NAMES[:2]), **dict.fromkeys(LOGPROBS, torch.zeros(0))},
            "policy_chosen: expected at least one pair, .*, got none",
        ),
        ({"dph_epsilon": 0.5}, "dph_epsilon: expected 0.0 <= dph_epsilon < 0.5, got 0.5"),
        ({"dpo_epsilon": -0.01}, "dpo_epsilon: expected .*, got -0.01"),
        ({"dpo_epsilon": float("nan")}, "dpo_epsilon: expected .*, got nan"),
        ({"beta": -1.0}, "beta: expected 0.0 <= beta <= inf, got -1.0"),
        ({"dph_weight": -1.0}, "dph_weight: expected .*, got -1.0"),
        ({"dpo_weight": float("nan")}, "dpo_weight: expected .*, got nan"),
        ({"objective": "hinge"}, "objective: expected one of 'separable', 'contrastive', got 'hinge'"),
        ({"backend": "fast"}, "backend: expected 'auto' or one of .*, got 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    inputs = {name: torch.zeros(5) for name in NAMES}
    with pytest.raises(ValueError, match=message):
        preference_loss(**{**inputs, **change})


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match=r"preference_loss: backend 'cuda' cannot run: .+"):
        preference_loss(torch.zeros(5), torch.zeros(5), backend="cuda")
