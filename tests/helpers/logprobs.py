"""Inputs of linear_logprob, plain PyTorch, and the comparison of the two."""

import torch
from helpers.numerics import assert_close_to_fp64

from dph_kernels.linear_logprob import linear_logprob

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


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


def compare(hidden, weight, targets, backend, grad=None, **options):
    """Values and both gradients of an operator call against eager PyTorch."""
    got = linear_logprob(hidden, weight, targets, backend=backend, **options)
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
