"""preference_loss as PyTorch sees it: autograd to any order, compiling, tracing, and what else wraps tensors."""

import sys

import pytest
import torch
from helpers.numerics import implementations
from helpers.preferences import DEFAULTS, NAMES, formula, make
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dph_kernels import dispatch, native
from dph_kernels.preference_loss import preference_loss

BACKENDS = implementations("preference_loss")


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


def operator_arguments(inputs, backend, objective="separable"):
    """What the operator behind the public function is called with."""
    groups = [[x.detach() for x in list(inputs.values())[i:j] if x is not None] for i, j in ((0, 2), (2, 6))]
    return *groups, 0.6, 0.25, 0.1, 1.0, 0.5, objective, backend


@PARTS
@pytest.mark.parametrize("heads", [None, 1, 2])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_opcheck(device, backend, heads, parts):
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if len(parts) == 1:
        tests.pop()  # it takes NaN, which metrics of a part that is off are, for different from NaN; see the next test
    arguments = operator_arguments(make(5, heads, parts=parts, device=device), backend)
    torch.library.opcheck(torch.ops.dph.preference_loss.default, arguments, test_utils=tests)


@PARTS
@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_compiles_as_one_graph(device, backend, heads, parts):
    def run(*values):
        arguments = {**dict.fromkeys(NAMES), **dict(zip(given, values, strict=True))}
        loss, metrics = preference_loss(**arguments, backend=backend)
        return loss * 2, metrics

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for pairs in (5, 7, 9):  # the second size makes it dynamic, the third runs what that gave
        inputs = make(pairs, heads, parts=parts, device=device)
        given = [name for name, x in inputs.items() if x is not None]
        values = [inputs[name] for name in given]
        with torch.compiler.set_stance("fail_on_recompile") if pairs == 9 else torch.enable_grad():
            loss, metrics = compiled(*values)
        expected, same = run(*values)
        torch.testing.assert_close(metrics, same, equal_nan=True)
        torch.testing.assert_close(torch.autograd.grad(loss, values), torch.autograd.grad(expected, values))


class Recorder(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.seen.append(function)
        return function(*arguments, **(options or {}))


OPERATOR = torch.ops.dph.preference_loss.default


def test_who_watches_sees_the_operator():
    """Plain calls go past the dispatcher; whoever traces, fakes or wraps tensors is not gone past."""
    inputs = tuple(x.detach() for x in make(5).values())
    expected = preference_loss(*inputs)
    with Recorder() as recorder:
        torch.testing.assert_close(preference_loss(*inputs), expected)
    assert OPERATOR in recorder.seen

    graph = make_fx(lambda *x: preference_loss(*x)[0])(*inputs)
    assert OPERATOR in [node.target for node in graph.graph.nodes]
    assert graph(*(2 * x for x in inputs)) == preference_loss(*(2 * x for x in inputs))[0]

    loss, _ = preference_loss(*(TwoTensor(x, 2 * x) for x in inputs))
    assert loss.a == expected[0]
    assert loss.b == preference_loss(*(2 * x for x in inputs))[0]

    with FakeTensorMode() as fake:
        loss, metrics = preference_loss(*(fake.from_tensor(x) for x in inputs))
    assert (loss.shape, metrics.shape) == ((), (12,))


@pytest.mark.skipif(native.missing("cpu") is not None, reason=str(native.missing("cpu")))
def test_plain_calls_do_not_pay_for_the_dispatcher(monkeypatch):
    operator = sys.modules["dph_kernels.preference_loss"].OPERATOR
    monkeypatch.setattr(operator, "operator", lambda **_: pytest.fail("reached"))
    preference_loss(torch.nn.Parameter(torch.zeros(5)), torch.zeros(5))
    with pytest.raises(pytest.fail.Exception, match="reached"):
        preference_loss(TwoTensor(torch.zeros(5), torch.zeros(5)), torch.zeros(5))


def test_without_the_extension_nothing_changes(monkeypatch):
    inputs = make(7, 3)
    expected = preference_loss(**inputs, backend="reference")
    grads = torch.autograd.grad(expected[0], inputs.values())
    monkeypatch.setattr(native, "missing", lambda _: "not built")
    monkeypatch.setattr(dispatch, "missing", dispatch.missing.__wrapped__)
    monkeypatch.setattr(dispatch, "choose", dispatch.choose.__wrapped__)
    monkeypatch.setattr(dispatch, "implementation", dispatch.implementation.__wrapped__)
    got = preference_loss(**inputs)
    assert torch.equal(got[0], expected[0])
    assert all(map(torch.equal, torch.autograd.grad(got[0], inputs.values()), grads))
    with pytest.raises(ValueError, match=r"rewards_rejected: expected shape \[7, 3\], got \[7\]"):
        preference_loss(**{**inputs, "rewards_rejected": torch.zeros(7)}, backend="reference")


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_views_with_the_other_sign(device, backend):
    """PyTorch keeps a flag and no negated numbers: what reads memory itself has to ask for them."""
    numbers = torch.randn(2, 9, dtype=torch.complex64, device=device).conj().imag.unbind()
    assert all(x.is_neg() for x in numbers)
    want = preference_loss(*(x.resolve_neg() for x in numbers), backend=backend)
    for got, expected in zip(preference_loss(*numbers, backend=backend), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_gradients_of_the_loss_in_any_form(device, backend):
    """Batches of them have no memory of their own (vmap, new and old), and a negated one has that of another."""
    inputs = make(5, 2, device=device)
    loss, values = preference_loss(**inputs, backend=backend)[0], tuple(inputs.values())
    grads = lambda factor: torch.autograd.grad(loss, values, factor, retain_graph=True)  # noqa: E731
    one, factors = grads(None), torch.tensor([1.0, -2.0, 0.0], device=device)
    old = torch.autograd.grad(loss, values, factors, is_grads_batched=True, retain_graph=True)
    for found in (old, torch.func.vmap(grads)(factors)):
        assert all(torch.equal(many, torch.stack([f * x for f in factors])) for many, x in zip(found, one, strict=True))
    minus = torch.tensor(1 - 1j, device=device).conj().imag.neg()
    negated = torch.complex(minus, minus).conj().imag
    assert negated.is_neg()
    assert all(torch.equal(x, negated.item() * y) for x, y in zip(grads(negated), one, strict=True))
    expanded = torch.full((1,), 3.0, device=device).expand(4)[2]
    assert all(torch.equal(x, 3 * y) for x, y in zip(grads(expanded), one, strict=True))


def test_whoever_watches_the_backward_pass_sees_it():
    values = tuple(torch.randn(5, requires_grad=True) for _ in range(2))
    loss = preference_loss(*values)[0]
    grads = lambda factor: torch.autograd.grad(loss, values, factor, retain_graph=True)  # noqa: E731
    one = grads(torch.ones(()))
    graph = make_fx(grads)(torch.ones(()))
    assert all(torch.equal(x, 3 * y) for x, y in zip(graph(torch.tensor(3.0)), one, strict=True))
    found = torch.func.functionalize(grads)(torch.tensor(3.0))
    assert all(torch.equal(x, 3 * y) for x, y in zip(found, one, strict=True))
    with Recorder() as recorder:
        grads(torch.ones(()))
    assert torch.ops.aten.mul.Tensor in recorder.seen
    with forward_ad.dual_level():
        duals = grads(forward_ad.make_dual(torch.tensor(2.0), torch.tensor(5.0)))
        assert all(torch.equal(forward_ad.unpack_dual(x).tangent, 5 * y) for x, y in zip(duals, one, strict=True))
    zeros = grads(torch._efficientzerotensor(()))
    assert all(torch.equal(x, torch.zeros(5)) for x in zeros)


def test_what_hooks_keep_is_what_counts():
    """A hook may keep less of the slopes than they are."""
    values = tuple(torch.randn(5, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.bfloat16(), lambda x: x):
        loss = preference_loss(*values)[0]
    rounded = torch.autograd.grad(loss, values)
    exact = torch.autograd.grad(preference_loss(*values)[0], values)
    for got, want in zip(rounded, exact, strict=True):
        torch.testing.assert_close(got, want.bfloat16().float(), rtol=0, atol=0)


def test_the_operator_itself_checks():
    five = torch.zeros(5)
    for rewards, logprobs, message in (
        ([five] * 2, [five] * 40, "policy_chosen, .*: expected 4 tensors, got 40"),
        ([five], [], "rewards_chosen, rewards_rejected: expected 2 tensors, got 1"),
        ([five, torch.zeros(6)], [], r"rewards_rejected: expected shape \[5\], got \[6\]"),
        ([torch.zeros(())] * 2, [], r"rewards_chosen: expected shape \[N\] or"),
    ):
        with pytest.raises(ValueError, match=message):
            OPERATOR(rewards, logprobs, 0.1, 0.1, 0.1, 1.0, 1.0, "separable", "auto")


def test_tensors_without_memory():
    zeros = torch._efficientzerotensor(5)
    assert preference_loss(zeros, torch.zeros(5))[0] == preference_loss(torch.zeros(5), torch.zeros(5))[0]
    freed = torch.zeros(5)
    freed.untyped_storage().resize_(0)
    with pytest.raises((RuntimeError, ValueError)):
        preference_loss(freed, torch.zeros(5), backend="cpu")


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_another_default_device_changes_nothing(device, backend):
    rewards = torch.randn(2, 9, device=device).unbind()
    want = preference_loss(*rewards, backend=backend)
    with torch.device("meta"):
        got = preference_loss(*rewards, backend=backend)
    assert torch.equal(got[0], want[0])
