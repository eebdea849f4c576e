"""LaProp when its parameters change: cast, moved, exchanged or written to, before the first step and later."""

import copy
import warnings

import pytest
import torch
from test_optim import numbers, run, two
from torch import nn

from dph.optim import LaProp

SETTINGS = {"lr": 1.0, "prior_decay": 0.5, "weight_decay": 0.1}
CHANGED = r"2 of 2 parameters differ from their priors .*, first param_groups\[0\]: params\[0\] \('a'\); prior_decay"


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LaProp:")
        yield


class Pair(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.a, self.b = two(dtype)


def build(dtype=torch.float32, **settings):
    model = Pair(dtype)
    return model, LaProp(model.named_parameters(), **{**SETTINGS, **settings})


def exchange(model, optimiser):
    """Other parameters of the same values, as accelerate gives to an optimizer for FSDP2."""
    for name, p in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(p.detach().clone()))
    optimiser.param_groups[0]["params"] = list(model.parameters())


def swap(model, optimiser):
    for p in model.parameters():
        torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone()))


def replace_data(model, optimiser):
    for p in model.parameters():
        p.data = p.data.clone()


def go_to_meta_and_back(model, optimiser):
    values = copy.deepcopy(model.state_dict())
    for name, p in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(p.detach().to("meta")))
    optimiser.param_groups[0]["params"] = list(model.parameters())
    optimiser.state_dict()
    model.to_empty(device="cpu")
    model.load_state_dict(values)
    optimiser.param_groups[0]["params"] = list(model.parameters())


CHANGES = {
    "cast to bf16": lambda model, _: model.bfloat16(),
    "cast to fp16": lambda model, _: model.half(),
    "cast to fp64": lambda model, _: model.double(),
    "the same data": replace_data,
    "the same weights": lambda model, _: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "exchanged": exchange,
    "swapped": swap,
    "meta": go_to_meta_and_back,
}


@pytest.mark.parametrize("then", ["step", "save", "copy"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_the_first_step(change, then):
    """All is as if the optimizer was built after the change, except that priors keep their precision."""
    model, optimiser = build()
    CHANGES[change](model, optimiser)
    other = Pair().to(model.a.dtype)
    if then == "save":
        optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    elif then == "copy":
        model, optimiser = copy.deepcopy((model, optimiser))
    expected = LaProp(other.parameters(), **SETTINGS)
    for p, q in zip(other.parameters(), Pair().parameters(), strict=True):
        if p.dtype != torch.float64:
            expected.state[p]["prior"] = q.detach()
    run(optimiser, list(model.parameters()), 4)
    run(expected, list(other.parameters()), 4)
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    kept = [p for p in optimiser.state if isinstance(p, torch.Tensor)]
    assert len(kept) == 2, "the state of former parameters is freed"


@pytest.mark.parametrize("prior_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_loaded_after_the_optimizer_was_built(dtype, prior_dtype):
    """The optimizer warns, keeps its priors, and does not undo the loading (by masters)."""
    model, optimiser = build(dtype, prior_dtype=prior_dtype)
    with torch.no_grad():
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    loaded = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=CHANGED) as caught:
        run(optimiser, list(model.parameters()), 1)
    assert caught[0].filename.endswith("test_optim.py"), "the warning points to the caller of step"
    for p, before in zip(model.parameters(), loaded, strict=True):
        assert (p - before).abs().max() < 0.1
    run(optimiser, list(model.parameters()), 1, first=1)  # without another warning


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", [lambda p: p.data.mul_(2), lambda p: setattr(p, "data", p.data * 2)])
def test_what_is_written_through_data_before_the_first_step_warns(write, dtype):
    """In place it leaves no trace but the values; a master follows."""
    model, optimiser = build(dtype)
    for p in model.parameters():
        write(p)
    written = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=CHANGED):
        run(optimiser, list(model.parameters()), 1)
    for p, before in zip(model.parameters(), written, strict=True):
        assert (p - before).abs().max() < 0.1


def test_without_priors_nothing_is_compared():
    model, optimiser = build(prior_decay=0.0)
    for p in model.parameters():
        p.data = p.data * 2
    run(optimiser, list(model.parameters()), 1)


def test_a_loaded_state_brings_its_own_priors():
    """To load weights and then the state is the usual way to resume, and has nothing to warn of."""
    model, optimiser = build()
    run(optimiser, list(model.parameters()), 2)
    resumed, other = build()
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(optimiser.state_dict())
    run(optimiser, list(model.parameters()), 2, first=2)
    run(other, list(resumed.parameters()), 2, first=2)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


@pytest.mark.parametrize("steps", [0, 2])
def test_only_the_state_of_a_new_run_is_compared(steps):
    """The priors of a run that has begun differ from its weights."""
    model, optimiser = build()
    run(optimiser, list(model.parameters()), steps)
    other, resumed = build()
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    with torch.no_grad():
        other.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    if steps:
        run(resumed, list(other.parameters()), 1, first=steps)
    else:
        with pytest.warns(UserWarning, match=CHANGED):
            run(resumed, list(other.parameters()), 1)


def test_a_captured_first_step_compares_nothing(monkeypatch):
    """It may not wait for the device."""
    model, optimiser = build()
    model.a.data.mul_(2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr("dph.optim._same_values", None)
    run(optimiser, list(model.parameters()), 1)


def test_a_later_group_is_compared_before_its_first_step():
    model, optimiser = build()
    run(optimiser, list(model.parameters()), 2)
    late = nn.Parameter(numbers(3))
    optimiser.add_param_group({"params": [("late", late)]})
    with torch.no_grad():
        late.add_(1)
    with pytest.warns(
        UserWarning, match=r"1 of 3 parameters differ .* first param_groups\[1\]: params\[0\] \('late'\)"
    ):
        run(optimiser, [*model.parameters(), late], 1, first=2)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_written_into_a_parameter_reaches_its_master(dtype, steps):
    """The other elements keep their fp32 values."""
    model, optimiser = build(dtype, prior_decay=0.0)
    run(optimiser, list(model.parameters()), steps)
    masters = [optimiser.state[p]["master"].clone() for p in model.parameters()]
    with torch.no_grad():
        model.a[2:] = 7.0
    saved = [state["master"] for state in optimiser.state_dict()["state"].values()]
    masters[0][2:] = 7.0
    assert all(map(torch.equal, saved, masters))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with torch.no_grad():
        model.b.zero_()
    optimiser.param_groups[0].update(lr=0.0)
    optimiser.step()  # by momentum
    assert (model.a - masters[0]).abs().max() < 0.02
    assert model.b.abs().max() < 0.02


@pytest.mark.parametrize(
    ("dtype", "change", "message"),
    [
        (torch.float32, "cast to bf16", r"expected torch.float32 on cpu as at the last step, got a .* torch.bfloat16"),
        (torch.float32, "cast to fp64", r"expected torch.float32 on cpu as at the last step, got a .* torch.float64"),
        (torch.bfloat16, "cast to fp64", r"expected torch.bfloat16 or torch.float16 on cpu .*, got a .* torch.float64"),
    ],
)
def test_a_cast_after_the_first_step_is_refused_and_the_advice_helps(dtype, change, message):
    model, optimiser = build(dtype)
    run(optimiser, list(model.parameters()), 2)
    moments = [state["exp_avg"].clone() for state in optimiser.state.values()]
    for p in model.parameters():
        p.grad = None
        p.grad_dtype = None
    CHANGES[change](model, optimiser)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(
        ValueError, match=rf"^param_groups\[0\]: params\[0\] \('a'\): {message}.*: it was cast or moved"
    ):
        run(optimiser, list(model.parameters()), 1, first=2)
    assert all(map(torch.equal, model.parameters(), before))
    optimiser.load_state_dict(optimiser.state_dict())
    for state, moment in zip(optimiser.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment.to(state["exp_avg"].dtype))
    run(optimiser, list(model.parameters()), 1, first=2)


def coast(params, optimiser):
    """A step by momentum alone."""
    optimiser.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimiser.step()


@pytest.mark.parametrize("then", ["step", "save", "weights"])
@pytest.mark.parametrize("former", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("present", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_after_a_state_was_loaded(former, present, then):
    """The state follows: moments, clock and prior stay as they are, and so does the precision of masters."""
    model, optimiser = build(former)
    run(optimiser, list(model.parameters()), 3)
    resumed, other = build(former)
    resumed.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    resumed.to(present)
    params = list(resumed.parameters())
    if then == "step":
        coast(list(model.parameters()), optimiser)
        coast(params, other)
    elif then == "save":
        other.state_dict()
    else:
        other.weights(dict(zip(params, "ab", strict=True)))
    for p, q in zip(params, model.parameters(), strict=True):
        after, before = other.state[p], optimiser.state[q]
        assert after["step"] == before["step"] == (4 if then == "step" else 3)
        for key in ("exp_avg", "exp_avg_sq", "prior"):
            torch.testing.assert_close(after[key], before[key].to(after[key].dtype), rtol=1e-6, atol=0)
        assert ("master" in after) == (present in (torch.bfloat16, torch.float16))
        precise, expected = after.get("master", p.detach()), before.get("master", q.detach())
        if former == torch.float32:  # rounded by the cast, before the optimizer could see it
            expected = expected.to(present)
        tolerance = 1e-6 if former != torch.float32 or then != "step" else 0.01
        torch.testing.assert_close(precise, expected.to(precise.dtype), rtol=tolerance, atol=tolerance)


def test_what_is_written_after_a_cast_counts():
    model, optimiser = build(torch.bfloat16)
    run(optimiser, list(model.parameters()), 3)
    optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    masters = [optimiser.state[p]["master"].clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = p.grad_dtype = None
    model.float()
    with torch.no_grad():
        model.a[2:] = 7.0
    optimiser.state_dict()
    masters[0][2:] = 7.0
    assert all(map(torch.equal, model.parameters(), masters))


def test_an_exchange_after_a_state_was_loaded_is_refused():
    model, optimiser = build()
    run(optimiser, list(model.parameters()), 2)
    optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    exchange(model, optimiser)
    with pytest.raises(ValueError, match=r"params\[0\] \('a'\): expected the parameter that the state belongs to, got"):
        run(optimiser, list(model.parameters()), 1)


def sparse(p, optimiser):
    p.grad = torch.ones_like(p).to_sparse()


def wrong_dtype(p, optimiser):
    p.grad = None
    p.grad_dtype = None
    p.grad = torch.ones(5, 3, dtype=torch.float64 if p.dtype != torch.float64 else torch.int64)


def cast(p, optimiser):
    p.grad = p.grad_dtype = None
    p.data = p.data.to(torch.float64 if p.dtype != torch.float64 else torch.float32)
    p.grad = torch.ones_like(p)


def reshape(p, optimiser):
    p.grad = None
    p.data = torch.zeros(3, 5, dtype=p.dtype)
    p.grad = torch.ones_like(p)


def stretch(p, optimiser):
    p.data = p.data.repeat(1, 2)[:, ::2]


def exchange_one(p, optimiser):
    for group in optimiser.param_groups:
        group["params"] = [nn.Parameter(q.detach().clone()) if q is p else q for q in group["params"]]
        for q in group["params"]:
            q.grad = torch.ones_like(q)


def drop_prior(p, optimiser):
    del optimiser.state[p]["prior"]


def move_the_rate(p, optimiser):
    optimiser.param_groups[-1]["lr"] = torch.tensor(0.1, device="meta")


SPOILS = [sparse, wrong_dtype, cast, reshape, stretch, exchange_one, drop_prior, move_the_rate]


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["groups", "dtypes"])
def test_a_step_that_raises_changes_nothing(layout, dtype, spoil):
    """Although only the last of three parameters, each with a launch of its own, is at fault."""
    others = [other for other in (torch.float32, torch.bfloat16, torch.float64) if other != dtype]
    kinds = [dtype] * 3 if layout == "groups" else [*others, dtype]
    params = [nn.Parameter(numbers(5, 3, seed=i).to(kind)) for i, kind in enumerate(kinds)]
    groups = [{"params": [p]} for p in params] if layout == "groups" else [{"params": params}]
    optimiser = LaProp(groups, **SETTINGS)
    run(optimiser, params, 2)
    spoil(params[-1], optimiser)
    present = [p for group in optimiser.param_groups for p in group["params"]]
    values = lambda: copy.deepcopy([*present, *optimiser.state.values(), *optimiser._clocks])  # noqa: E731
    before = values()
    with pytest.raises(ValueError, match=r"expected|prior_decay"):
        optimiser.step()
    torch.testing.assert_close(values(), before, rtol=0, atol=0)


def test_an_exchange_after_the_first_step_is_refused():
    model, optimiser = build()
    run(optimiser, list(model.parameters()), 2)
    saved = copy.deepcopy(optimiser.state_dict())
    exchange(model, optimiser)
    for save in (lambda: run(optimiser, list(model.parameters()), 1), optimiser.state_dict):
        with pytest.raises(
            ValueError, match=r"params\[0\] \('a'\): expected the parameter that the state belongs to, got"
        ):
            save()
    optimiser.load_state_dict(saved)  # the advice, without a new optimizer
    run(optimiser, list(model.parameters()), 1)


def test_one_parameter_cast_after_the_first_step_is_refused():
    """Among others of its new dtype, which have masters."""
    params = [nn.Parameter(numbers(3).bfloat16()), nn.Parameter(numbers(3))]
    optimiser = LaProp(params, lr=1.0)
    run(optimiser, params, 1)
    params[1].grad = None
    params[1].data = params[1].data.bfloat16()
    params[1].grad_dtype = None
    with pytest.raises(ValueError, match=r"params\[1\]: expected torch.float32 on cpu as at the last step"):
        run(optimiser, params, 1)


def test_a_new_shape_after_the_first_step_is_refused():
    model, optimiser = build()
    run(optimiser, list(model.parameters()), 2)
    model.b.grad = None
    model.b.data = torch.zeros(6, 3)
    with pytest.raises(ValueError, match=r"params\[1\] \('b'\): expected the parameter .* of shape \[6, 3\]"):
        run(optimiser, list(model.parameters()), 1)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_without_gradients_warns(steps):
    """The model has other parameters than the optimizer."""
    model, optimiser = build()
    run(optimiser, list(model.parameters()), steps)
    optimiser.zero_grad()
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    model.a.sum().backward()
    with pytest.warns(UserWarning, match="no parameter has a gradient, so the step changed nothing. Were the model's"):
        optimiser.step()
