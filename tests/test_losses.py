"""The objectives: the paper's own numbers, its two theorems, and errors."""

import math

import pytest
import torch
from safetensors.torch import load_file

from dph import losses
from dph_kernels.preference_loss import PREFERENCE_METRICS, preference_loss

LOGPROBS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
OBJECTIVES = ("separable", "contrastive")
EPSILONS = (0.01, 0.1, 0.25, 0.4)


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "losses.safetensors")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.25])
def test_dph_loss_is_the_papers(golden, objective, epsilon):
    tag = f"{objective}.eps{epsilon}"
    chosen, rejected = (golden[f"reward_{side}"].clone().requires_grad_() for side in ("chosen", "rejected"))
    loss = losses.dph_loss(chosen, rejected, epsilon=epsilon, objective=objective)
    loss.backward()
    torch.testing.assert_close(loss, golden[f"{tag}.loss"])
    torch.testing.assert_close(chosen.grad, golden[f"{tag}.grad_chosen"])
    torch.testing.assert_close(rejected.grad, golden[f"{tag}.grad_rejected"])
    metrics = preference_loss(chosen, rejected, dph_epsilon=epsilon, objective=objective)[1]
    named = dict(zip(PREFERENCE_METRICS, metrics, strict=True))
    torch.testing.assert_close(named["reward_accuracy"], golden[f"{tag}.dph/accuracy"])
    torch.testing.assert_close(named["reward_margin"], golden[f"{tag}.dph/margin"])


@pytest.mark.parametrize(("beta", "epsilon", "reduction"), [(0.1, 0.0, "sum"), (0.6, 0.25, "sum"), (0.6, 0.25, "mean")])
def test_cdpo_loss_is_the_papers(golden, beta, epsilon, reduction):
    tag = f"dpo.beta{beta}.eps{epsilon}.{reduction}"
    logits = {name: golden[f"dpo.{name}_logits"].clone().requires_grad_() for name in LOGPROBS}
    logprobs = [
        losses.sequence_logprobs(logits[name], golden[f"dpo.{name.split('_')[1]}_labels"], reduction)
        for name in LOGPROBS
    ]
    loss = losses.cdpo_loss(*logprobs, beta=beta, epsilon=epsilon)
    loss.backward()
    torch.testing.assert_close(loss, golden[f"{tag}.loss"])
    for name in LOGPROBS[:2]:
        torch.testing.assert_close(logits[name].grad, golden[f"{tag}.grad_{name}"], rtol=1e-4, atol=1e-6)
    metrics = preference_loss(None, None, *logprobs, beta=beta, dpo_epsilon=epsilon)[1]
    named = dict(zip(PREFERENCE_METRICS, metrics, strict=True))
    for name in ("accuracy", "margin", "chosen", "rejected"):
        torch.testing.assert_close(named[f"implicit_{name}"], golden[f"{tag}.dpo/{name}"])


def test_a_tie_counts_as_wrong_in_the_papers_numbers_too(shared):
    """The first alignment step compares the policy with itself: every implicit margin is 0."""
    step = load_file(shared / "golden" / "align.safetensors")
    same = torch.zeros(4)
    metrics = preference_loss(step["step0.reward_chosen"], step["step0.reward_rejected"], *[same] * 4)[1]
    named = dict(zip(PREFERENCE_METRICS, metrics, strict=True))
    assert named["implicit_accuracy"] == step["step0.dpo/accuracy"] == 0.0
    torch.testing.assert_close(named["dpo_loss"], step["step0.loss_dpo"])
    torch.testing.assert_close(named["dph_loss"], step["step0.loss_dph"])
    torch.testing.assert_close(named["reward_accuracy"], step["step0.dph/accuracy"])


def descend(objective, epsilon, start, steps=600, rate=6.0):
    """Gradient descent on the rewards of two pairs, nothing else, in fp64.

    The loss's curvature is at most 1/4 per reward (1/2 along a margin), so a rate of 6 per pair cannot overshoot
    for the separable objective, nor 3 for the contrastive one.
    """
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in start)
    rate = rate * len(chosen) / (1 if objective == "separable" else 2)
    for _ in range(steps):
        loss = losses.dph_loss(chosen, rejected, epsilon=epsilon, objective=objective)
        grads = torch.autograd.grad(loss, (chosen, rejected))
        with torch.no_grad():
            chosen -= rate * grads[0]
            rejected -= rate * grads[1]
    return chosen.detach(), rejected.detach()


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_theorem_1_separable_rewards_converge_to_the_log_odds(epsilon):
    optimum = math.log((1 - epsilon) / epsilon)
    chosen, rejected = descend("separable", epsilon, ([0.0, -5.0], [0.0, 7.0]))
    torch.testing.assert_close(chosen, torch.full_like(chosen, optimum), rtol=0, atol=1e-6)
    torch.testing.assert_close(rejected, torch.full_like(rejected, -optimum), rtol=0, atol=1e-6)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_theorem_2_contrastive_margins_converge_to_the_log_odds(epsilon):
    start = ([0.0, -5.0], [0.0, 7.0])
    chosen, rejected = descend("contrastive", epsilon, start)
    optimum = torch.full_like(chosen, math.log((1 - epsilon) / epsilon))
    torch.testing.assert_close(chosen - rejected, optimum, rtol=0, atol=1e-6)
    # Only the margin is determined: the mean of the two stays as it was.
    torch.testing.assert_close(chosen + rejected, torch.tensor(start, dtype=torch.float64).sum(0))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("epsilon", [0.0, *EPSILONS])
def test_second_derivatives_are_positive_on_a_grid(objective, epsilon):
    """The gradient's own gradient over [-8, 8] squared: both theorems' minima are the only ones.

    Separable: d2L/dr2 = sigmoid(r) sigmoid(-r) for either reward. Contrastive: the same of the margin.
    """
    axis = torch.linspace(-8, 8, 33, dtype=torch.float64)
    chosen, rejected = (grid.flatten().requires_grad_() for grid in torch.meshgrid(axis, axis, indexing="ij"))
    loss = losses.dph_loss(chosen, rejected, epsilon=epsilon, objective=objective) * len(chosen)
    slopes = torch.autograd.grad(loss, (chosen, rejected), create_graph=True)
    for slope, reward in zip(slopes, (chosen, rejected), strict=True):
        (second,) = torch.autograd.grad(slope.sum(), reward, retain_graph=True)
        at = (reward if objective == "separable" else chosen - rejected).detach()
        assert (second > 0).all()
        torch.testing.assert_close(second, at.sigmoid() * (-at).sigmoid())


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_hessian_of_the_separable_loss_is_diagonal(epsilon):
    """Theorem 1's rewards are independent; theorem 2's have no curvature along r_w + r_l."""
    rewards = torch.tensor([0.3, -1.2], dtype=torch.float64)
    hessians = {
        objective: torch.autograd.functional.hessian(
            lambda r, objective=objective: losses.dph_loss(r[:1], r[1:], epsilon, objective), rewards
        )
        for objective in OBJECTIVES
    }
    torch.testing.assert_close(hessians["separable"], torch.diag(rewards.sigmoid() * (-rewards).sigmoid()))
    torch.testing.assert_close(hessians["contrastive"].sum(1), torch.zeros(2, dtype=torch.float64))
    assert hessians["contrastive"][0, 0] > 0.1


def test_several_heads_are_averaged():
    chosen, rejected = torch.randn(5, 3), torch.randn(5, 3)
    per_head = [losses.dph_loss(chosen[:, k], rejected[:, k]) for k in range(3)]
    torch.testing.assert_close(losses.dph_loss(chosen, rejected), torch.stack(per_head).mean())


def make_sequences(dtype=torch.float32):
    logits = torch.randn(3, 7, 11).to(dtype).requires_grad_()
    targets = torch.randint(11, (3, 7))
    targets[0, :4], targets[1] = -100, -100
    return logits, targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sequence_logprobs(dtype):
    logits, targets = make_sequences(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    scores = logits.detach().to(wide).log_softmax(-1)
    expected = [sum(scores[b, s, t] for s, t in enumerate(row) if t != -100) for b, row in enumerate(targets.tolist())]
    got = losses.sequence_logprobs(logits, targets)
    assert got.dtype == wide
    torch.testing.assert_close(got, torch.tensor(expected, dtype=wide))
    mean = losses.sequence_logprobs(logits, targets, reduction="mean")
    torch.testing.assert_close(mean[[0, 2]], got[[0, 2]] / torch.tensor([3, 7]))


def test_a_sequence_without_targets_has_sum_zero_and_mean_nan():
    logits, targets = make_sequences()
    sums = losses.sequence_logprobs(logits, targets)
    assert sums[1] == 0
    assert losses.sequence_logprobs(logits, targets, "mean").isnan().tolist() == [False, True, False]
    sums.sum().backward()
    assert torch.equal(logits.grad[1], torch.zeros(7, 11))
    assert torch.equal(logits.grad[0, :4], torch.zeros(4, 11))
    assert (logits.grad[2] != 0).any(-1).all()


def test_no_sequences_at_all():
    assert losses.sequence_logprobs(torch.zeros(0, 4, 5), torch.zeros(0, 4, dtype=torch.int64)).shape == (0,)
    assert losses.sequence_logprobs(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64)).tolist() == [0.0, 0.0]


def test_sequence_logprobs_of_strided_logits():
    logits, targets = make_sequences()
    expected = losses.sequence_logprobs(logits, targets)
    strided = logits.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(losses.sequence_logprobs(strided, targets), expected)


def test_sequence_logprobs_of_extreme_logits_stay_finite_and_never_above_zero():
    logits = torch.tensor([[[1e4, -1e4, 0.0], [0.0, 1e4, 1e4]]])
    got = losses.sequence_logprobs(logits, torch.tensor([[1, 2]]))
    torch.testing.assert_close(got, torch.tensor([-2e4 - math.log(2)]))
    assert losses.sequence_logprobs(logits, torch.tensor([[0, -100]])) == 0


def test_losses_compile_as_one_graph():
    logits, targets = make_sequences()

    def loss(logits):
        logprobs = losses.sequence_logprobs(logits, targets)
        return losses.cdpo_loss(logprobs, logprobs.flip(0), logprobs * 0.5, logprobs * 0.25) + losses.dph_loss(
            logprobs, logprobs.flip(0)
        )

    expected = torch.autograd.grad(loss(logits), logits)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(logits), logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "max"}, "reduction: expected one of 'sum', 'mean', got 'max'"),
        ({"logits": torch.zeros(7, 11)}, r"logits: expected shape \[B, S, V\], got \[7, 11\]"),
        ({"logits": torch.zeros(3, 7, 11, dtype=torch.int64)}, "logits: expected float16 or .*, got int64"),
        ({"targets": torch.zeros(3, 6, dtype=torch.int64)}, r"targets: expected shape \[3, 7\], got \[3, 6\]"),
        ({"targets": torch.zeros(3, 7)}, "targets: expected int64, got float32"),
        ({"targets": torch.zeros(3, 7, dtype=torch.int64, device="meta")}, "targets: expected a tensor on cpu"),
        ({"targets": torch.full((3, 7), 11)}, r"targets: expected values in \[0, 11\) or -100, got 11"),
        ({"targets": torch.full((3, 7), -1)}, r"targets: expected values in \[0, 11\) or -100, got -1"),
    ],
)
def test_bad_sequences(change, message):
    arguments = {"logits": torch.zeros(3, 7, 11), "targets": torch.zeros(3, 7, dtype=torch.int64), **change}
    with pytest.raises(ValueError, match=message):
        losses.sequence_logprobs(**arguments)


def test_bad_pairs():
    with pytest.raises(ValueError, match="rewards_chosen: expected a tensor, got float"):
        losses.dph_loss(1.0, 2.0)
    with pytest.raises(ValueError, match=r"rewards_rejected: expected shape \[3\], got \[2\]"):
        losses.dph_loss(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"dph_epsilon: expected 0.0 <= dph_epsilon < 0.5, got 0.5"):
        losses.dph_loss(torch.zeros(3), torch.zeros(3), epsilon=0.5)
    with pytest.raises(ValueError, match="objective: expected one of"):
        losses.dph_loss(torch.zeros(3), torch.zeros(3), objective="hinge")
    with pytest.raises(ValueError, match=r"reference_rejected: expected shape \[3\], got \[1\]"):
        losses.cdpo_loss(*[torch.zeros(3)] * 3, torch.zeros(1))
    with pytest.raises(ValueError, match="expected at least one pair"):
        losses.cdpo_loss(*[torch.zeros(0)] * 4)
