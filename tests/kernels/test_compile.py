"""All operators in one graph under PyTorch's own compiler."""

import pytest
import torch

from dph_kernels import (
    PackedLayout,
    Rotary,
    laprop,
    linear_logprob,
    preference_loss,
    residual_norm,
    rope_attention,
    swiglu,
    swiglu_reward,
)

HEADS, WIDTH, TOKENS = 2, 16, 12


def make():
    """Input, weights by name, and what LaProp takes for them."""
    sizes = {"qkv": (3 * WIDTH, WIDTH), "vocabulary": (29, WIDTH), "reward": (1, WIDTH), "pooler": (WIDTH, WIDTH)}
    sizes |= {"norm": (WIDTH,), "gates": (2 * WIDTH, WIDTH)}
    weights = {name: torch.randn(size).mul(0.3).requires_grad_() for name, size in sizes.items()}
    lists = {name: [torch.randn(size).abs() for size in sizes.values()] for name in ("grads", "exp_avg", "exp_avg_sq")}
    return torch.randn(TOKENS, WIDTH), weights, {"params": [w.detach().clone() for w in weights.values()], **lists}


@pytest.mark.slow
@pytest.mark.usefixtures("inductor")
def test_a_function_of_all_operators():
    """Attention, log-probabilities, rewards and the joint loss of two answers to a prompt, and a step in place."""
    layout, rope = PackedLayout.shared_prefix([4], [[4, 4]]), Rotary()
    answers, ends, targets = torch.arange(4, 12), torch.tensor([7, 11]), torch.arange(8)

    def run(x, weights, lists):
        q, k, v = (x @ weights["qkv"].T).view(TOKENS, 3, HEADS, -1).unbind(1)
        update = rope_attention(q, k, v, layout, rope=rope).flatten(1)
        total, normed = residual_norm(x, update, weights["norm"], backend="reference")
        hidden = total + swiglu(normed @ weights["gates"].T, backend="reference")
        logprobs = linear_logprob(hidden[answers].tanh(), weights["vocabulary"], targets).view(2, 4).sum(1)
        rewards = swiglu_reward(hidden[ends], weights["reward"], w2=weights["pooler"], dropout=0.1, seed=3)[:, 0]
        reference = logprobs.detach() * 0.9
        pairs = (rewards[:1], rewards[1:], logprobs[:1], logprobs[1:], reference[:1], reference[1:])
        laprop(**lists, lr=1e-2, weight_decay=0.1)
        return preference_loss(*pairs)

    x, weights, lists = make()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="inductor")):
        own = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
        loss, metrics = function(x, weights, own)
        results.append([loss, metrics, torch.autograd.grad(loss, list(weights.values())), own])
    torch.testing.assert_close(*results)
    loss, _, grads, own = results[1]
    assert loss.isfinite()
    assert all(grad.abs().max() > 0 for grad in grads)
    assert not any(map(torch.equal, own["params"], lists["params"]))
