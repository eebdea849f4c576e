"""Inputs of preference_loss, and its formulas as the paper writes them."""

import torch
from torch.nn.functional import logsigmoid

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


def smoothed(x, epsilon):
    """(1 - epsilon) log sigmoid(x) + epsilon log sigmoid(-x)."""
    return (1 - epsilon) * logsigmoid(x) + (epsilon * logsigmoid(-x) if epsilon else 0)


def formula(inputs, beta, dpo_epsilon, dph_epsilon, objective, dpo_weight, dph_weight):
    """(loss, metrics by name) as the paper writes them."""
    r_w, r_l, *logprobs = inputs.values()
    found = {}
    loss = 0.0
    if r_w is not None:
        e = dph_epsilon
        terms = smoothed(r_w, e) + smoothed(-r_l, e) if objective == "separable" else smoothed(r_w - r_l, e)
        found["dph_loss"] = -terms.mean()
        found.update(describe("reward", r_w, r_l))
        loss = loss + dph_weight * found["dph_loss"]
        for i in range(r_w.shape[1] if r_w.dim() == 2 else 0):
            own = {"dph_loss": -terms[:, i].mean(), **describe("reward", r_w[:, i], r_l[:, i])}
            found.update({f"{name}_{i}": value for name, value in own.items()})
    if logprobs[0] is not None:
        p_w, p_l, f_w, f_l = logprobs
        e, d = dpo_epsilon, beta * ((p_w - p_l) - (f_w - f_l))
        found["dpo_loss"] = -smoothed(d, e).mean()
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
