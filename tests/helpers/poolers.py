"""Poolers and reward heads for tests of `swiglu_reward`: inputs, plain PyTorch, and the comparison of the two."""

import torch
from helpers.numerics import assert_close_to_fp64

from dph_kernels import philox
from dph_kernels.swiglu_reward import swiglu_reward

SIZES = [(1, 1, 1, 1), (2, 3, 5, 1), (63, 64, 65, 2), (64, 65, 63, 1), (3, 111, 257, 5), (65, 2, 1, 3), (257, 16, 8, 1)]
POOLERS = ["identity", "bert", "swiglu"]
WEIGHTS = {"identity": (), "bert": ("w2", "b2"), "swiglu": ("w1", "b1", "w2", "b2")}


def make(rows, columns, width, heads, pooler="swiglu", dtype=torch.float32, device="cpu"):
    """Named inputs: hidden, reward and the pooler's weights, of a size that keeps tanh away from saturation."""
    inner = width if pooler == "swiglu" else columns
    shapes = {
        "hidden": (rows, columns),
        "reward": (heads, columns),
        "w1": (2 * width, columns),
        "b1": (2 * width,),
        "w2": (columns, inner),
        "b2": (columns,),
    }
    names = ("hidden", "reward", *WEIGHTS[pooler])
    fan_in = {"reward": columns, "w1": columns, "w2": 4 * inner, "b2": 4}  # tanh gets numbers of half their size
    return {
        name: torch.randn(shapes[name], device=device).div(fan_in.get(name, 1) ** 0.5).to(dtype).requires_grad_()
        for name in names
    }


def eager(hidden, reward, w1=None, b1=None, w2=None, b2=None, input_mask=None, mask=None):
    """What one would write, in the precision of the inputs."""
    state = hidden if input_mask is None else hidden * input_mask
    if w1 is not None:
        x, g = torch.nn.functional.linear(state, w1, b1).chunk(2, -1)
        state = x * torch.nn.functional.silu(g)
    if w2 is not None:
        state = torch.nn.functional.linear(state, w2, b2).tanh()
    return (state if mask is None else state * mask) @ reward.T


def as_fp64(inputs):
    return {name: x.detach().double().requires_grad_() for name, x in inputs.items()}


def compare(inputs, backend, grad=None, **options):
    """Rewards and all gradients of an operator call against eager PyTorch under the same masks."""
    hidden = inputs["hidden"]
    rows = options.get("row_ids", torch.arange(len(hidden), device=hidden.device))

    def draw(p, stream):
        return philox.dropout_mask(rows, hidden.shape[1], p, options.get("seed", 0), stream, torch.float64)

    masks = {
        "input_mask": draw(options.get("input_dropout", 0.0), philox.INPUT),
        "mask": draw(options.get("dropout", 0.0), philox.POOLED),
    }
    got = swiglu_reward(**inputs, **options, backend=backend)
    same = eager(**inputs, **{name: mask.to(hidden.dtype) for name, mask in masks.items()})
    wide = as_fp64(inputs)
    truth = eager(**wide, **masks)
    assert got.dtype == torch.promote_types(hidden.dtype, torch.float32)
    # On a GPU fp32 is multiplied in parts of 11 bits, and exp and quotients are some units in the last place off.
    floor = 4e-6 if backend == "triton" and hidden.is_cuda and hidden.dtype == torch.float32 else None
    assert_close_to_fp64(got, same, truth, "rewards", floor=floor)
    grad = torch.randn_like(got) if grad is None else grad
    gradients = zip(
        inputs,
        torch.autograd.grad(got, inputs.values(), grad),
        torch.autograd.grad(same, inputs.values(), grad.to(same.dtype)),
        torch.autograd.grad(truth, wide.values(), grad.double()),
        strict=True,
    )
    for name, ours, theirs, true in gradients:
        assert ours.dtype == inputs[name].dtype
        assert_close_to_fp64(ours, theirs, true, f"gradient of {name}", floor=floor)
