"""The one definition of an operator: every operator uses it, and its options work by themselves."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dph_kernels import dispatch
from dph_kernels.operator import Gradient, JointGradient, Operator


@pytest.mark.parametrize("name", dispatch.AUTO)
def test_every_operator_is_defined_by_it(name):
    operator = importlib.import_module(f"dph_kernels.{name}").OPERATOR
    assert isinstance(operator, Operator)
    assert operator.name == f"dph::{name}"
    assert getattr(torch.ops.dph, name).default is operator.operator._opoverload


def fake(x: Tensor, others: list[Tensor], shift: Tensor | None, factor: float, backend: str) -> Tensor:
    """x * factor + sum(others) + shift."""
    return torch.empty_like(x)


def fake_backward(grad: Tensor, factor: float, backend: str) -> Tensor:
    """Gradient of x."""
    return torch.empty_like(grad)


def setup(ctx, output, inputs):
    ctx.factor, ctx.others = inputs["factor"], len(inputs["others"])


def compute(ctx, needs, backward, grad):
    grads = {"x": backward(grad=grad, factor=ctx.factor) if needs["x"] else None}
    grads["shift"] = grad.clone() if needs["shift"] else None
    return grads | {"others": [grad.clone() for _ in range(ctx.others)]}


CALLS = []
"""Functions of the implementation that were called."""


def forward(*, x, others, shift, factor):
    CALLS.append("forward")
    return x * factor + sum(others) + (0 if shift is None else shift)


def backward(*, grad, factor):
    CALLS.append("backward")
    return grad * factor


def forward_and_gradients(*, x, others, shift, factor):
    CALLS.append("forward_and_gradients")
    return x * factor + sum(others) + shift, torch.full_like(x, factor)


def setup_joint(ctx, results, inputs):
    output, ctx.kept = results
    setup(ctx, output, inputs)
    return output


def compute_joint(ctx, needs, backward, grad):
    return {"x": ctx.kept * grad, "others": [grad.clone() for _ in range(ctx.others)], "shift": grad.clone()}


def check(inputs):
    if inputs["factor"] < 0:
        raise ValueError("factor: expected at least 0")


OPERATOR = Operator(
    "test_operator",
    fake=fake,
    like=lambda inputs: inputs["x"],
    gradient=Gradient(setup=setup, compute=compute, fake=fake_backward, like="grad"),
    joint=JointGradient(pays=lambda _, inputs: inputs["x"].requires_grad, setup=setup_joint, compute=compute_joint),
    check=check,
)


@pytest.fixture(autouse=True)
def implementation(monkeypatch):
    module = SimpleNamespace(forward=forward, backward=backward, forward_and_gradients=forward_and_gradients)
    monkeypatch.setattr(dispatch, "implementation", lambda *_: module)
    CALLS.clear()


def inputs(shift=True):
    x, *others = (torch.randn(5, requires_grad=True) for _ in range(3))
    return {"factor": 3.0, "shift": torch.randn(5, requires_grad=True) if shift else None, "others": others, "x": x}


@pytest.mark.parametrize("way", ["bypass", "dispatcher"])
@pytest.mark.parametrize("shift", [True, False])
def test_keywords_in_any_order_and_gradients_of_lists(shift, way, monkeypatch):
    if way == "dispatcher":
        monkeypatch.setattr(dispatch, "can_bypass_dispatcher", lambda _: False)
    given = inputs(shift)
    leaves = [given["x"], *given["others"], *([given["shift"]] if shift else [])]
    got = OPERATOR(backend="auto", **given)
    torch.testing.assert_close(got, 3 * given["x"] + sum(leaves[1:]))
    grads = torch.autograd.grad(got.sum(), leaves)
    for grad, factor in zip(grads, [3.0, 1.0, 1.0, 1.0], strict=False):
        assert torch.equal(grad, torch.full((5,), factor))
    assert CALLS == ["forward", "backward"]


def test_joint_gradients_are_used_if_they_are_permitted_and_pay():
    given = inputs()
    (grad,) = torch.autograd.grad(OPERATOR(**given, backend="auto", joint={}).sum(), given["x"])
    assert CALLS == ["forward_and_gradients"]
    assert torch.equal(grad, torch.full((5,), 3.0))
    given["x"].requires_grad_(False)
    OPERATOR(**given, backend="auto", joint={})
    with torch.no_grad():
        OPERATOR(**inputs(), backend="auto", joint={})
    assert CALLS == ["forward_and_gradients", "forward", "forward"]


def test_gradients_of_gradients_are_refused():
    given = inputs()
    (grad,) = torch.autograd.grad(OPERATOR(**given, backend="auto").square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()
    out = OPERATOR(**given, backend="auto", joint={})
    (grad,) = torch.autograd.grad(out.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.sum().backward()


@pytest.mark.parametrize("way", ["bypass", "dispatcher"])
@pytest.mark.parametrize("joint", [{}, None])
def test_values_are_checked_on_every_way(joint, way, monkeypatch):
    if way == "dispatcher":
        monkeypatch.setattr(dispatch, "can_bypass_dispatcher", lambda _: False)
    with pytest.raises(ValueError, match="factor: expected at least 0"):
        OPERATOR(**inputs() | {"factor": -1.0}, backend="auto", joint=joint)
    assert not CALLS


def test_direct_calls():
    given = inputs()
    with torch.no_grad():
        out = OPERATOR.forward(**given, backend="auto")
    assert not out.requires_grad
    assert torch.equal(OPERATOR.backward(grad=torch.ones(5), factor=3.0, backend="auto"), torch.full((5,), 3.0))


def test_profiles_name_the_operator():
    given = inputs()
    with torch.profiler.profile() as profile:
        with torch.no_grad():
            OPERATOR(**given, backend="auto")
        OPERATOR(**given, backend="auto").sum().backward()
        OPERATOR.backward(grad=torch.ones(5), factor=3.0, backend="auto")
    names = {event.key for event in profile.key_averages()}
    assert {"dph::test_operator", "dph::test_operator_backward"} <= names
