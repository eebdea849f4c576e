"""The faster interpreter of tests computes the same results as Triton's own, bit for bit."""

import pytest
import torch
from helpers.quick import stock

from dph_kernels import PackedLayout, Rotary, preference_loss, rope_attention, swiglu_reward

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here, not interpreted")


def attention(x):
    layout = PackedLayout.documents([5, 4])
    return rope_attention(*(x[i : i + 9] for i in (0, 9, 18)), layout, rope=Rotary(), backend="triton").square().sum()


def reward(x):
    weights = x.reshape(-1)[:640].view(40, 16)
    return swiglu_reward(
        weights[:5], weights[5:7], w1=weights[8:24], w2=weights[24:40, :8].contiguous(), dropout=0.5, backend="triton"
    ).sum()


def loss(x):
    return preference_loss(*x.reshape(-1)[:36].view(6, 6), backend="triton")[0]


def results(operator, given):
    """Value and gradient."""
    x = given.clone().requires_grad_()
    value = operator(x)
    return value.detach(), *torch.autograd.grad(value, x)


@pytest.mark.parametrize("operator", [attention, reward, loss], ids=lambda operator: operator.__name__)
def test_bit_for_bit(operator):
    pytest.importorskip("triton")
    given = torch.randn(27, 2, 16)
    with stock():
        expected = results(operator, given)
    for _ in range(2):
        assert all(map(torch.equal, results(operator, given), expected))
