"""Tensors that are not plain memory, and derivatives other than gradients: one rule for all operators and sizes."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import dph
from dph_kernels import (
    PackedLayout,
    Rotary,
    dispatch,
    gradient_norm,
    laprop,
    linear_logprob,
    preference_loss,
    residual_norm,
    rope_attention,
    swiglu,
    swiglu_reward,
)
from tests.helpers.tiny import tiny_model, tokens

LAYOUT = PackedLayout.with_memory([5], [4], 4)
MEMORY = torch.randn(2, 4, 2, 8, generator=torch.Generator().manual_seed(1)).unbind()
MEMORIES = {dtype: tuple(x.to(dtype) for x in MEMORY) for dtype in (torch.float32, torch.float64)}
TARGETS = torch.arange(4)
PAIRS = ("rewards_chosen", "rewards_rejected")
PAIRS += ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def attention(q, **given):
    return rope_attention(q, layout=LAYOUT, rope=Rotary(), memory=MEMORIES.get(q.dtype, MEMORY), **given)


SHAPES = {
    "residual_norm": {"x": (3, 8), "update": (3, 8), "weight": (8,), "bias": (8,)},
    "norm_alone": {"x": (3, 8), "weight": (8,)},
    "rms_norm": {"x": (3, 2, 8), "update": (3, 2, 8), "weight": (8,)},
    "swiglu": {"projected": (3, 8), "bias": (8,)},
    "rope_attention": {"q": (5, 2, 8), "k": (5, 2, 8), "v": (5, 2, 8)},
    "linear_logprob": {"hidden": (4, 8), "weight": (11, 8)},
    "preference_loss": dict.fromkeys(PAIRS, (5,)),
    "swiglu_reward": {"hidden": (4, 8), "reward": (2, 8), "w1": (12, 8), "b1": (12,), "w2": (8, 6), "b2": (8,)},
}
CALLS = {
    "residual_norm": lambda **given: residual_norm(**given),
    "norm_alone": lambda **given: residual_norm(update=None, **given)[1:],
    "rms_norm": lambda **given: residual_norm(kind="rms", **given),
    "swiglu": lambda **given: (swiglu(**given),),
    "rope_attention": lambda **given: (attention(**given),),
    "linear_logprob": lambda **given: (linear_logprob(targets=TARGETS, **given),),
    "preference_loss": lambda **given: preference_loss(**given)[:1],
    "swiglu_reward": lambda **given: (swiglu_reward(dropout=0.2, seed=3, **given),),
}
FOLDERS = {"norm_alone": "residual_norm", "rms_norm": "residual_norm"}  # of those called by another name
OPERATORS = pytest.mark.parametrize("operator", CALLS)


@pytest.fixture
def size(request, monkeypatch):
    """Whether "auto" counts the same tensors as few elements, for PyTorch's operations, or as many, for kernels."""
    if request.param == "many":
        monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    return request.param


SIZES = pytest.mark.parametrize("size", ["few", "many"], indirect=True)


def inputs(operator, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES[operator]
    return {name: torch.randn(shape, generator=generator).mul(0.5).to(dtype) for name, shape in shapes.items()}


def upstream(output):
    return torch.arange(output.numel()).cos().view(output.shape).to(output.dtype)


def gradients(operator, given, of_outputs=upstream, backend="auto"):
    """Gradients of all inputs."""
    leaves = {name: x.requires_grad_() for name, x in given.items()}
    outputs = CALLS[operator](**leaves, backend=backend)
    return torch.autograd.grad(outputs, list(leaves.values()), [of_outputs(x.detach()) for x in outputs])


def scalar(operator, names, backend="auto"):
    """A function of the inputs, in the order of their names, with one number as its value."""

    def function(*values):
        outputs = CALLS[operator](**dict(zip(names, values, strict=True)), backend=backend)
        return sum((x * upstream(x)).sum() for x in outputs)

    return function


# Memory


class Named(Tensor):
    """A subclass without methods."""


class Functions(Tensor):
    """A subclass with the default ``__torch_function__``, called explicitly."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def freed(x, size=0):
    copy = x.clone()
    copy.untyped_storage().resize_(size)
    return copy


def cut_off(x):
    """The second of two rows, in a storage that ends within it."""
    pair = torch.stack([x, x])
    row = pair[1]
    pair.untyped_storage().resize_(x.nbytes + 2)
    return row


READABLE = {
    "zero": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "negated lazily": lambda x: torch._neg_view(-x),
    "subclass": lambda x: x.clone().as_subclass(Named),
    "functions": lambda x: x.clone().as_subclass(Functions),
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
}


def moved_out(x):
    """A view behind the end of its storage, which has the view's size."""
    pair = torch.stack([x, x])
    row = pair[1]
    pair.untyped_storage().resize_(x.nbytes)
    return row


FREED = {"freed": freed, "too small": lambda x: freed(x, x.nbytes // 2), "view": cut_off, "moved": moved_out}
OTHER = {
    "sparse": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda x: torch.nested.nested_tensor(list(torch.atleast_2d(x))),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "uninitialised": lambda x: torch.nn.UninitializedParameter(),
    "meta": lambda x: x.to("meta"),
}


def plain(x):
    return None if x is None else x.detach().as_subclass(Tensor)


@SIZES
@OPERATORS
@pytest.mark.parametrize("kind", READABLE)
def test_tensors_with_numbers_are_read(operator, kind, size):
    """As each input and as upstream gradient, with the results of plain tensors."""
    make = READABLE[kind]
    for name in SHAPES[operator]:
        given = inputs(operator)
        expected = {**given, name: make(given[name]).clone().as_subclass(Tensor)}
        given[name] = make(given[name])
        for got, wanted in zip(gradients(operator, given), gradients(operator, expected), strict=True):
            torch.testing.assert_close(plain(got), plain(wanted))
    given = gradients(operator, inputs(operator), lambda x: make(upstream(x)))
    expected = gradients(operator, inputs(operator), lambda x: make(upstream(x)).clone().as_subclass(Tensor))
    for got, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(plain(got), plain(wanted))


@SIZES
@OPERATORS
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_freed_memory_is_refused_by_name(operator, backend, size):
    for name in SHAPES[operator]:
        given = inputs(operator)
        with pytest.raises(
            ValueError, match=f"^{name}: expected a storage of at least .* bytes, got 0: its memory was"
        ):
            CALLS[operator](**given | {name: freed(given[name])}, backend=backend)


@OPERATORS
@pytest.mark.parametrize("kind", FREED)
def test_a_storage_that_ends_early_is_refused_by_name(operator, kind, monkeypatch):
    """By the kernels; PyTorch's own operations, for few elements, read beyond a storage that has not vanished."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    for name in SHAPES[operator]:
        given = inputs(operator)
        with pytest.raises(ValueError, match=f"^{name}: expected a storage of at least .*: its memory was freed$"):
            CALLS[operator](**given | {name: FREED[kind](given[name])})
    with pytest.raises(ValueError, match=r"^(grad|d_total|d_normed): expected a storage of at least "):
        gradients(operator, inputs(operator), lambda x: FREED[kind](upstream(x)) if x.dim() else freed(upstream(x)))


@SIZES
@OPERATORS
@pytest.mark.parametrize("kind", OTHER)
def test_other_layouts_are_refused_by_name(operator, kind, size):
    """The error names the input, or the first that differs from it."""
    names = list(SHAPES[operator])
    for name in names:
        given = inputs(operator)
        with pytest.raises(ValueError, match=f"^{'|'.join(names)}: expected ") as raised:
            CALLS[operator](**given | {name: OTHER[kind](given[name])})
        if kind != "meta":
            assert str(raised.value).startswith(f"{name}: ")


STEP = ("params", "grads", "exp_avg", "exp_avg_sq", "priors")


def step_inputs():
    generator = torch.Generator().manual_seed(0)
    lists = {name: [torch.rand(3, 4, generator=generator), torch.rand(7, generator=generator)] for name in STEP}
    return lists


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("kind", [*READABLE, *FREED, "sparse", "nested"])
def test_lists_of_the_optimizer(kind, backend):
    make = (READABLE | FREED | OTHER)[kind]
    for name in STEP:
        given, expected = step_inputs(), step_inputs()
        given[name][1] = make(given[name][1])
        if kind not in READABLE:
            with pytest.raises(ValueError, match=rf"^{name}\[1\]: expected a (storage|dense)"):
                laprop(**given, lr=0.1, prior_decay=0.1, backend=backend)
        elif name in ("grads", "priors"):
            expected[name][1] = make(expected[name][1]).clone().as_subclass(Tensor)
            for lists in (given, expected):
                laprop(**lists, lr=0.1, prior_decay=0.1, backend=backend)
            for got, wanted in zip(given["params"], expected["params"], strict=True):
                torch.testing.assert_close(got, wanted)
    grads = step_inputs()["grads"]
    grads[1] = make(grads[1])
    if kind in READABLE:
        wanted = gradient_norm([grads[0], grads[1].clone().as_subclass(Tensor)], backend=backend).norm
        torch.testing.assert_close(gradient_norm(grads, backend=backend).norm, wanted)
    elif kind != "nested":
        with pytest.raises(ValueError, match=r"^grads\[1\]: expected a (storage|dense)"):
            gradient_norm(grads, backend=backend)


def test_numbers_of_the_optimizer():
    given = {name: step_inputs()[name] for name in STEP[:4]}
    with pytest.raises(ValueError, match=r"^grad_scale: expected a storage"):
        laprop(**given, lr=0.1, grad_scale=freed(torch.ones(1)))
    with pytest.raises(ValueError, match=r"^clock: expected a storage"):
        laprop(**given, lr=0.1, clock=freed(torch.zeros(2, dtype=torch.float64)))


# Derivatives


def product(xs, ys):
    """The sum of the products of all elements."""
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


@SIZES
@OPERATORS
def test_forward_mode(operator, size):
    """Every way to a directional derivative agrees with the gradients."""
    given = inputs(operator, torch.float64)
    names, values = list(given), tuple(given.values())
    tangents = tuple(map(upstream, values))
    function = scalar(operator, names)
    expected = product(gradients(operator, inputs(operator, torch.float64)), tangents)
    got = {
        "jvp": torch.func.jvp(function, values, tangents)[1],
        "linearize": torch.func.linearize(function, *values)[1](*tangents),
        "jacfwd": (torch.func.jacfwd(function)(*values) * tangents[0]).sum()
        + torch.func.jvp(lambda *rest: function(values[0], *rest), values[1:], tangents[1:])[1],
    }
    for leaves in (False, True):
        with forward_ad.dual_level():
            primals = [x.clone().requires_grad_(leaves) for x in values]
            duals = map(forward_ad.make_dual, primals, tangents)
            got[f"dual numbers, {leaves}"] = forward_ad.unpack_dual(function(*duals)).tangent
    for way, derivative in got.items():
        torch.testing.assert_close(derivative, expected, msg=lambda text, way=way: f"{way}: {text}")


@SIZES
@OPERATORS
def test_gradients_and_second_derivatives_of_torch_func(operator, size):
    given = inputs(operator, torch.float64)
    names, values = list(given), tuple(given.values())
    tangents, every = tuple(map(upstream, values)), tuple(range(len(given)))
    function = scalar(operator, names)
    grad = torch.func.grad(function, every)
    expected = gradients(operator, inputs(operator, torch.float64))
    for got, wanted in zip(grad(*values), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    value, backward = torch.func.vjp(function, *values)
    for got, wanted in zip(backward(torch.ones_like(value)), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    twice = torch.vmap(grad)(*(torch.stack([x, 2 * x]) for x in values))
    for got, wanted in zip(twice, expected, strict=True):
        torch.testing.assert_close(got[0], wanted)
    # Hessian times vector: both orders, and the difference of gradients.
    step = 1e-5
    ahead, behind = (grad(*map(partial(torch.add, alpha=a), values, tangents)) for a in (step, -step))
    reverse_then_forward = torch.func.jvp(grad, values, tangents)[1]
    forward_then_reverse = torch.func.grad(lambda *x: torch.func.jvp(function, x, tangents)[1], every)(*values)
    for i in every:
        wanted = (ahead[i] - behind[i]) / (2 * step)
        torch.testing.assert_close(reverse_then_forward[i], wanted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(forward_then_reverse[i], wanted, rtol=1e-5, atol=1e-7)


@OPERATORS
def test_a_kernel_by_name_refuses_them(operator):
    given = inputs(operator)
    names, values = list(given), tuple(given.values())
    function, reference = scalar(operator, names, "cpu"), scalar(operator, names, "reference")
    torch.testing.assert_close(torch.func.grad(reference)(*values), gradients(operator, given)[0])
    values = tuple(x.detach() for x in values)
    name = FOLDERS.get(operator, operator)
    message = f"^{name}: backend 'cpu' cannot run: torch.func and forward-mode differentiation need"
    for transformed in (torch.func.grad(function), torch.func.jacfwd(function), torch.func.hessian(function)):
        with pytest.raises(RuntimeError, match=message):
            transformed(*values)
    with forward_ad.dual_level():
        function(*values)  # of numbers without a tangent
        with pytest.raises(RuntimeError, match=message):
            function(forward_ad.make_dual(values[0], values[0]), *values[1:])


@OPERATORS
def test_tangents_of_upstream_gradients_are_not_lost(operator, monkeypatch):
    """The backward pass of a kernel has no tangent: refused, unless it consists of PyTorch's operations."""
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    leaves = [x.requires_grad_() for x in inputs(operator).values()]
    output = scalar(operator, list(SHAPES[operator]))(*leaves)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
        if operator == "preference_loss":
            for grad in torch.autograd.grad(output, leaves, dual):
                grad, tangent = forward_ad.unpack_dual(grad)
                torch.testing.assert_close(grad, tangent)
            return
        with pytest.raises(RuntimeError, match="expected a gradient that nothing differentiates"):
            torch.autograd.grad(output, leaves, dual)


def test_gradients_of_gradients_are_right_or_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "SMALL_ELEMENTS", 0)
    for operator in CALLS:
        leaves = [x.requires_grad_() for x in inputs(operator).values()]
        output = scalar(operator, list(SHAPES[operator]))(*leaves)
        grads = torch.autograd.grad(output, leaves, create_graph=True)
        if operator == "preference_loss":
            sum(grad.square().sum() for grad in grads).backward()
            continue
        name = FOLDERS.get(operator, operator)
        with pytest.raises(RuntimeError, match=f"{name}_backward.* no autograd formula"):
            sum(grad.square().sum() for grad in grads).backward()


def test_outputs_without_gradient_have_no_tangent():
    q, hidden, rewards = torch.randn(5, 2, 8), torch.randn(4, 8), torch.randn(3)
    with forward_ad.dual_level():
        q, hidden, rewards = (forward_ad.make_dual(x, torch.ones_like(x)) for x in (q, hidden, rewards))
        memory = tuple(forward_ad.make_dual(x, torch.ones_like(x)) for x in MEMORY)
        constants = [
            rope_attention(q, q.detach(), q, LAYOUT, rope=Rotary(), memory=MEMORY, return_keys=True)[1],
            linear_logprob(hidden, hidden, TARGETS, statistics=True)[1],
            preference_loss(rewards, rewards)[1],
        ]
        for x in constants:
            assert forward_ad.unpack_dual(x).tangent is None
        plain_q = torch.randn(5, 2, 8)
        out = rope_attention(plain_q, plain_q, plain_q, LAYOUT, rope=Rotary(), memory=memory)
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is None or not tangent.any()


def test_the_optimizer_refuses_tangents():
    given = {name: step_inputs()[name] for name in STEP[:4]}
    with forward_ad.dual_level():
        given["grads"][0] = forward_ad.make_dual(given["grads"][0], torch.ones(3, 4))
        with pytest.raises(RuntimeError, match="dph::laprop: expected tensors without tangents"):
            laprop(**given, lr=0.1)
        with pytest.raises(RuntimeError, match="dph::gradient_norm: expected tensors without tangents"):
            gradient_norm(given["grads"])


def test_a_graph_that_was_compiled_without_tangents_refuses_them():
    """Calls of the registered operator do so, too."""
    hidden, weight = inputs("linear_logprob").values()
    compiled = torch.compile(lambda x: linear_logprob(x, weight, TARGETS).sum(), backend="eager")
    compiled(hidden)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        with pytest.raises(RuntimeError, match="hidden: expected a tensor without a tangent"):
            compiled(dual)
        with pytest.raises(RuntimeError, match="projected: expected a tensor without a tangent"):
            torch.ops.dph.swiglu(dual, None, "reference")


@SIZES
def test_the_model_has_directional_derivatives(size):
    """With memory, too; what the memory keeps has no tangent and serves later calls."""
    model, ids = tiny_model().double(), tokens(2, 9)
    weights = {name: x.detach().clone() for name, x in model.named_parameters()}
    tangents = {name: upstream(x) * 0.1 for name, x in weights.items()}
    memory = dph.Memory(length=6)

    def loss(weights):
        memory.reset()
        for part in (ids[:, :5], ids[:, 5:]):
            arguments = {"labels": part, "past_key_values": memory}
            value = torch.func.functional_call(model, weights, (part,), arguments).loss
        return value

    model.zero_grad()
    loss(dict(model.named_parameters())).backward()
    expected = sum((x.grad * tangents[name]).sum() for name, x in model.named_parameters() if x.grad is not None)
    torch.testing.assert_close(torch.func.jvp(loss, (weights,), (tangents,))[1], expected)
    torch.testing.assert_close(loss(weights), loss(dict(model.named_parameters())).detach())
    grads = torch.func.grad(loss)(weights)
    torch.testing.assert_close(sum((x * tangents[name]).sum() for name, x in grads.items()), expected)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(x, tangents[name]) for name, x in weights.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(loss(duals)).tangent, expected)
    model(ids[:, :3], past_key_values=memory)
