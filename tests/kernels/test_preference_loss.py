"""preference_loss: every backend against the formulas as the paper prints them, in the same precision and in fp64."""

import itertools

import pytest
import torch
from helpers.numerics import assert_close_to_fp64, implementations, skip_where_unsupported
from helpers.preferences import DEFAULTS, LOGPROBS, NAMES, formula, make

from dph_kernels.preference_loss import HEAD_METRICS, PREFERENCE_METRICS, Labels, metric_names, preference_loss
from dph_kernels.preference_loss.reference import smoothed

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = implementations("preference_loss")
MANY = 2049  # pairs that are enough, with both parts of the objective, for C++ to take wide vectors


def as_fp64(inputs):
    return {name: x if x is None else x.detach().double().requires_grad_() for name, x in inputs.items()}


def named(metrics, heads=None):
    names = metric_names([str(i) for i in range(heads or 1)])
    return dict(zip(names, metrics.tolist(), strict=True))


def compare(inputs, backend, upstream=1.0, **options):
    """Loss, metrics and all gradients of an operator call against the formulas."""
    options = {**DEFAULTS, **options}
    first = next(x for x in inputs.values() if x is not None)
    skip_where_unsupported("preference_loss", first.device.type, backend, first.dtype)
    loss, metrics = preference_loss(**inputs, **options, backend=backend)
    same, _ = formula(inputs, **options)
    wide = as_fp64(inputs)
    truth, expected = formula(wide, **options)
    assert not metrics.requires_grad
    assert_close_to_fp64(loss, same, truth, "loss")
    rewards = inputs["rewards_chosen"]
    got = named(metrics, rewards.shape[1] if rewards is not None and rewards.dim() == 2 else None)
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
@pytest.mark.parametrize("pairs", [1, 2, 63, 64, 65, 111, 257, 2047, 2048])
def test_values_and_gradients(pairs, heads, objective, device, backend, dtype):
    compare(make(pairs, heads, dtype, device), backend, objective=objective)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("parts", [("dph",), ("dpo",)])
def test_either_part_may_be_off(parts, device, backend):
    compare(make(65, device=device, parts=parts), backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"dpo_weight": 0.0},
        {"dph_weight": 0.0},
        {"dpo_weight": 0.3, "dph_weight": 2.0},
        {"dpo_weight": 1, "dph_weight": 2, "beta": 1, "dph_epsilon": 0},
    ],
)
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
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[:1] + DTYPES[2:3], DTYPES[:3]])
def test_each_input_keeps_its_dtype(dtypes, device, backend):
    for dtype in dtypes:
        skip_where_unsupported("preference_loss", device, backend, dtype)
    inputs = make(33, 2, device=device)
    with torch.no_grad():
        mixed = {name: x.to(dtype) for (name, x), dtype in zip(inputs.items(), itertools.cycle(dtypes), strict=False)}
    mixed = {name: x.requires_grad_() for name, x in mixed.items()}
    loss, metrics = preference_loss(**mixed, backend=backend)
    loss.backward()
    wide = torch.float64 in dtypes
    assert loss.dtype == metrics.dtype == (torch.float64 if wide else torch.float32)
    truth = formula(as_fp64(mixed), **DEFAULTS)[0].item()
    assert loss.item() == pytest.approx(truth, rel=1e-12 if wide else 1e-6)
    assert all(x.grad.dtype == x.dtype and x.grad.isfinite().all() for x in mixed.values())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_kernels_never_narrow_fp64(backend):
    inputs = make(5)
    inputs["reference_rejected"] = inputs["reference_rejected"].detach().double()
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run: .*(float64|CUDA)"):
        preference_loss(**inputs, backend=backend)
    assert preference_loss(**inputs)[0].dtype == torch.float64


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("objective", ["separable", "contrastive"])
@pytest.mark.parametrize("heads", [None, 3])
def test_many_pairs(heads, objective, device, backend):
    """More than one group of the C++ kernel and than one program of the Triton kernel, the last one not full."""
    compare(make(9001, heads, device=device), backend, objective=objective)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_a_million_pairs(device, backend):
    if (device, backend) == ("cpu", "triton"):
        pytest.skip("interpreted kernels are slow")
    compare(make(1_000_000, device=device), backend)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("heads", [None, 2])
def test_the_same_bits_again(heads, device, backend):
    """Whatever the number of threads: sums are taken in one order."""
    inputs = make(70_000 if device == "cuda" or backend == "cpu" else 5000, heads, device=device)

    def run():
        loss, metrics = preference_loss(**inputs, backend=backend)
        return [loss, metrics, *torch.autograd.grad(loss, list(inputs.values()))]

    threads, first = torch.get_num_threads(), run()
    try:
        for count in (1, 2, 3, 1) if backend == "cpu" else (1,) * (100 if device == "cuda" else 2):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(), first))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_upstream_gradients_of_any_strides(device, backend):
    inputs = make(65, 2, device=device)
    loss, _ = preference_loss(**inputs, backend=backend)
    given = list(inputs.values())
    once = torch.autograd.grad(loss, given, retain_graph=True)
    weights = torch.tensor([0.5, 9.0, 1.5, 9.0], device=device)
    for upstream in (weights[::2], torch.ones(1, device=device).expand(2)):
        several = torch.autograd.grad(loss.expand(2), given, upstream, retain_graph=True)
        torch.testing.assert_close(several, tuple(2 * grad for grad in once))


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_gradients_may_be_changed_in_place(device, backend):
    """Each input has a gradient of its own, also those whose gradients are equal."""
    inputs = make(5, device=device)
    loss, _ = preference_loss(**inputs, backend=backend)
    loss.backward()
    kept = {name: x.grad.clone() for name, x in inputs.items()}
    for name, x in inputs.items():
        x.grad.fill_(7.0)
        kept[name].fill_(7.0)
        assert all(torch.equal(inputs[other].grad, kept[other]) for other in NAMES), name


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("needed", [NAMES[:1], NAMES[1:3], NAMES[3:5], NAMES[5:]])
def test_only_some_inputs_need_a_gradient(needed, device, backend):
    inputs = make(33, device=device)
    every = torch.autograd.grad(preference_loss(**inputs, backend=backend)[0], list(inputs.values()))
    some = {name: x.detach().requires_grad_(name in needed) for name, x in inputs.items()}
    preference_loss(**some, backend=backend)[0].backward()
    for name, expected in zip(NAMES, every, strict=True):
        assert torch.equal(some[name].grad, expected) if name in needed else some[name].grad is None


@pytest.mark.usefixtures("overflow_is_an_error")
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_row_offsets_beyond_two_to_the_31(device, backend):
    """Three pairs that lie 2**30 elements apart. Only pages that are touched take memory."""
    try:
        room = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"needs 4 GB of address space: {error}")
    far = [room[i:].as_strided((3,), (2**30,)) for i in range(6)]
    inputs = {name: x.detach().half() for name, x in make(3, device=device).items()}
    for x, near in zip(far, inputs.values(), strict=True):
        x.copy_(near)
    got = preference_loss(*far, backend=backend)
    torch.testing.assert_close(got, preference_loss(*inputs.values(), backend=backend))


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
@pytest.mark.parametrize("copies", [1, 1400])
def test_stable_at_ten_thousand(copies, epsilon, objective, device, backend):
    """Exact values: log sigmoid(x) is 0 or x out there."""
    far = torch.tensor([1e4, -1e4, 0.0], device=device).repeat(copies)
    chosen, rejected = far.clone().requires_grad_(), (-far).requires_grad_()
    options = {"dph_epsilon": epsilon, "objective": objective}
    loss, _ = preference_loss(chosen, rejected, **options, backend=backend)
    loss.backward()
    expected = 2e4 + 2 * 0.6931471805599453 if objective == "separable" else 2e4 + 0.6931471805599453
    assert loss.item() == pytest.approx(expected / 3, rel=1e-6)
    slopes = torch.tensor([epsilon, epsilon - 1, epsilon - 0.5], device=device).repeat(copies) / len(far)
    torch.testing.assert_close(chosen.grad, slopes)
    torch.testing.assert_close(rejected.grad, -slopes)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("size", [20.0, 80.0, 1e4])
@pytest.mark.parametrize("pairs", [1, MANY])
def test_large_values_and_ties(pairs, size, dtype, device, backend):
    """All pairs alike, so that no large loss hides a small one."""
    for first, second in itertools.product((size, 0.0, -size), repeat=2):
        inputs = make(pairs, dtype=dtype, device=device)
        for x, value in zip(inputs.values(), (first, second, first, second, 0.0, 0.0), strict=True):
            x.detach().fill_(value)
        for objective in ("separable", "contrastive"):
            compare(inputs, backend, beta=1.0, dph_epsilon=0.0, dpo_epsilon=0.0, objective=objective)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pairs", [4001, 2 * 4001])
def test_every_slope_is_accurate(pairs, device, backend):
    """To some units in the last place, also where exp underflows; below the normal numbers 0 will do."""
    rewards = torch.linspace(-110, 110, pairs, device=device).requires_grad_()
    loss, _ = preference_loss(rewards, torch.zeros_like(rewards), dph_epsilon=0.0, backend=backend)
    loss.backward()
    slopes = -torch.sigmoid(-rewards.detach().double())
    torch.testing.assert_close(rewards.grad.double() * len(rewards), slopes, rtol=1e-6, atol=1e-34)


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
@pytest.mark.parametrize("pairs", [5, MANY])
def test_nan_is_never_hidden(pairs, value, broken, device, backend):
    inputs = {name: x.detach() for name, x in make(pairs, device=device).items()}
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
@pytest.mark.parametrize("objective", ["separable", "contrastive"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pair", [0, 9000])
def test_a_head_that_is_not_finite_is_told_from_the_others(pair, value, objective, device, backend):
    inputs = {name: x.detach() for name, x in make(9001, 3, device=device).items()}
    inputs["rewards_rejected"][pair, 1] = value
    got = named(preference_loss(**inputs, objective=objective, dph_epsilon=0.0, backend=backend)[1], 3)
    finite = {name for name, x in got.items() if abs(x) < torch.inf}
    broken = {f"{name}_1" for name in ("reward_margin", "reward_rejected")}
    if value == -torch.inf:  # judged rightly with certainty: without smoothing no loss at all
        assert got["finite"] == 1.0
    else:
        assert got["finite"] == 0.0
        broken |= {"loss", "dph_loss", "dph_loss_1"}
    assert finite.isdisjoint(broken)
    assert {f"{name}_{head}" for name in HEAD_METRICS for head in (0, 2)} <= finite


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pairs", [5, MANY])
def test_nan_reaches_the_gradients_of_its_pair_only(pairs, device, backend):
    inputs = make(pairs, device=device)
    inputs["rewards_chosen"].detach()[1] = torch.nan
    inputs["policy_rejected"].detach()[3] = torch.nan
    preference_loss(**inputs, backend=backend)[0].backward()
    expected = {"rewards_chosen": [1], "rewards_rejected": [], **{name: [3] for name in LOGPROBS}}
    for name, pairs in expected.items():
        assert inputs[name].grad.isnan().nonzero().flatten().tolist() == pairs, name


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    inputs = make(64, 2, device="cuda")
    preference_loss(**inputs)[0].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, metrics = preference_loss(**inputs)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics[PREFERENCE_METRICS.index("finite")] == 1.0


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_a_tie_is_wrong(device, backend):
    same = torch.ones(4, device=device)
    _, metrics = preference_loss(same, same, same, same, same, same, backend=backend)
    assert named(metrics)["reward_accuracy"] == named(metrics)["implicit_accuracy"] == 0.0


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("pairs", [65, 5000])
@pytest.mark.usefixtures("poisoned_empty")
def test_every_element_is_written(pairs, device, backend):
    inputs = make(pairs, 3, device=device)
    loss, metrics = preference_loss(**inputs, backend=backend)
    loss.backward()
    assert metrics.isfinite().all()
    assert all(x.grad.isfinite().all() for x in inputs.values())


def test_metric_names():
    assert metric_names() == metric_names(["only"]) == PREFERENCE_METRICS
    several = metric_names(["safe", "helpful"])
    assert several[:12] == PREFERENCE_METRICS
    assert several[12:17] == tuple(f"{name}_safe" for name in HEAD_METRICS)
    assert several[17:] == tuple(f"{name}_helpful" for name in HEAD_METRICS)


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


# Labels


def labels_of(weights, pairs=None, margin=None):
    """Labels with the weights [2, N, K] of both answers, and totals of all of them."""
    chosen, rejected = weights
    zeros = chosen.new_zeros(len(chosen))
    pairs = zeros + 1 if pairs is None else pairs
    totals = torch.stack([(chosen + rejected) / 2, chosen, rejected]).sum(1)
    return Labels(chosen, rejected, pairs, zeros if margin is None else margin, totals, pairs.sum())


@pytest.mark.parametrize("objective", ["separable", "contrastive"])
@pytest.mark.parametrize("heads", [None, 3])
def test_labels_of_weight_1_are_plain_pairs(objective, heads):
    inputs = make(7, heads)
    plain, expected = preference_loss(**inputs, objective=objective)
    labels = labels_of(torch.ones(2, 7, heads or 1))
    loss, metrics = preference_loss(**inputs, objective=objective, labels=labels)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(metrics, expected, rtol=1e-5, atol=1e-5)
    given = list(inputs.values())
    for ours, theirs in zip(torch.autograd.grad(loss, given), torch.autograd.grad(plain, given), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_each_head_has_the_loss_of_its_own_labels():
    """A head without labels adds nothing, and has no metrics; an absent answer counts by neither loss nor gradient."""
    rewards = torch.randn(2, 6, 3, requires_grad=True)
    weights = torch.zeros(2, 6, 3)
    weights[:, :4, 0] = 1.0  # pairs
    weights[0, 4:, 1] = 1.0  # good answers alone
    loss, metrics = preference_loss(*rewards, labels=labels_of(weights))
    pairs = preference_loss(rewards[0, :4, 0], rewards[1, :4, 0])[0]
    alone = 2 * smoothed(rewards[0, 4:, 1], 0.1).mean()  # half of a pair's weight
    torch.testing.assert_close(loss, (pairs + alone) / 3)
    (grad,) = torch.autograd.grad(loss, rewards)
    assert torch.equal(grad != 0, weights != 0)
    got = named(metrics, 3)
    assert got["dph_loss_0"] == pytest.approx(pairs.item(), abs=1e-6)
    assert got["reward_accuracy_1"] == pytest.approx((rewards[0, 4:, 1] > 0).float().mean().item())
    assert got["reward_chosen_1"] == pytest.approx(rewards[0, 4:, 1].mean().item(), abs=1e-6)
    assert all(torch.tensor(got[f"{name}_2"]).isnan() for name in HEAD_METRICS)
    assert got["finite"] == 1.0


def test_labels_that_do_not_fit_are_named():
    rewards, labels = torch.randn(2, 4, 2), labels_of(torch.ones(2, 4, 2))
    with pytest.raises(ValueError, match=r"labels\.chosen: expected shape \[4, 1\], got \[4, 2\]"):
        preference_loss(*rewards[..., 0], labels=labels)
    with pytest.raises(ValueError, match=r"labels\.totals: expected shape \[3, 2\], got \[2\]"):
        preference_loss(*rewards, labels=labels._replace(totals=torch.ones(2)))
    with pytest.raises(ValueError, match="backend: expected"):
        preference_loss(*rewards, labels=labels, backend="cpu")
