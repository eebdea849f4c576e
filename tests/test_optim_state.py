"""LaProp's state: saved and loaded in PyTorch's layout and in that of checkpoints, and refused if it does not fit."""

import copy
import itertools
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_optim import SETTINGS, numbers, run, two
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from dph.optim import LaProp, param_groups


def go_on(state, params, optimiser, dtype=torch.float32, **settings):
    """Load ``state`` into a fresh optimizer over copies; both continue for four steps, bit for bit."""
    others = two(dtype)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    resumed = LaProp(others, lr=1.0, **settings)
    resumed.load_state_dict(copy.deepcopy(state))
    run(optimiser, params, 4, first=4)
    run(resumed, others, 4, first=4)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    return resumed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tag", SETTINGS)
def test_state_dict_goes_on_bit_for_bit(tag, dtype):
    make = lambda: [nn.Parameter(numbers(5, 3, seed=i).to(dtype)) for i in range(2)]  # noqa: E731
    params, others = make(), make()
    straight = LaProp(params, lr=1.0, **SETTINGS[tag])
    run(straight, params, 4)
    saved = {"state": straight.state_dict(), "weights": [p.detach().clone() for p in params]}
    saved["state"] = {  # a real save holds its own copies
        "state": {i: {k: v.clone() for k, v in s.items()} for i, s in saved["state"]["state"].items()},
        "param_groups": [dict(g) for g in saved["state"]["param_groups"]],
    }
    run(straight, params, 4, first=4)
    for p, weight in zip(others, saved["weights"], strict=True):
        p.data.copy_(weight)
    resumed = LaProp(others, lr=1.0, **SETTINGS[tag])
    resumed.load_state_dict(saved["state"])
    assert all(t.dtype == torch.float32 for s in resumed.state.values() for k, t in s.items() if k != "step")
    run(resumed, others, 4, first=4)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_state_dict_has_the_layout_of_pytorchs_optimisers(tmp_path):
    params = two()
    optimiser = LaProp(params, lr=1.0, prior_decay=0.5)
    run(optimiser, params, 4)
    saved = optimiser.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert list(saved["state"]) == [0, 1]
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq", "prior"} for s in saved["state"].values())
    assert [s["step"].item() for s in saved["state"].values()] == [4, 4]
    assert all(isinstance(t, torch.Tensor) for s in saved["state"].values() for t in s.values())
    torch.save(saved, tmp_path / "o.pt")
    run(optimiser, params, 1, first=4)
    assert saved["state"][0]["step"] == 4, "what counts steps is a copy"
    other = two()
    run(LaProp(other, lr=1.0, prior_decay=0.5), other, 5)
    assert all(map(torch.equal, params, other)), "saving changes nothing"
    resumed = LaProp(two(), lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    assert resumed.state_dict()["param_groups"] == saved["param_groups"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_goes_through_another_of_pytorchs_optimisers(dtype):
    params = two(dtype)
    optimiser = LaProp(params, lr=1.0, **SETTINGS["both"])
    run(optimiser, params, 4)
    other = torch.optim.AdamW(two(dtype), lr=1.0)
    other.load_state_dict(optimiser.state_dict())
    go_on(other.state_dict(), params, optimiser, dtype, **SETTINGS["both"])


def test_state_of_an_older_layout():
    """In old checkpoints, groups had the step count, and no dtype of the prior."""
    params = two()
    optimiser = LaProp(params, lr=1.0, **SETTINGS["both"])
    run(optimiser, params, 4)
    saved = optimiser.state_dict()
    saved["param_groups"][0]["step"] = 4
    for state in saved["state"].values():
        del state["step"]
    del saved["param_groups"][0]["prior_dtype"]
    resumed = go_on(saved, params, optimiser, **SETTINGS["both"])
    assert resumed.state_dict()["param_groups"][0]["prior_dtype"] == "float32"
    assert "step" not in resumed.param_groups[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["state"][1].update(step=torch.tensor(5.0)), r"expected one step for all parameters.*(4|5)\.0, "),
        (lambda s: s["state"][1].pop("step"), "expected one step for all parameters of a group, got .*None"),
        (lambda s: s["param_groups"][0].pop("rate_average"), "expected one rate_average for all parameters"),
        (lambda s: s["state"].pop(1), "expected exp_avg and exp_avg_sq of parameter 1, got none"),
        (lambda s: s["state"][1].pop("exp_avg"), "expected exp_avg of parameter 1, got none"),
    ],
)
def test_an_incomplete_state_is_refused(spoil, message):
    params = two()
    optimiser = LaProp(params, lr=1.0)
    run(optimiser, params, 4)
    saved = copy.deepcopy(optimiser.state_dict())
    spoil(saved)
    before, clock = [p.detach().clone() for p in params], optimiser.state_dict()["state"][0]["step"]
    with pytest.raises(ValueError, match=f"state_dict: {message}"):
        optimiser.load_state_dict(saved)
    assert all(map(torch.equal, params, before))
    assert optimiser.state_dict()["state"][0]["step"] == clock


def test_a_state_of_other_shapes_is_refused():
    mine, other = ([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(*shape))] for shape in ((2, 3), (3, 2)))
    saved = LaProp(other, lr=0.1).state_dict()
    with pytest.raises(ValueError, match=r"state_dict: exp_avg of parameter 1: expected shape .*2, 3.*, got .*3, 2"):
        LaProp(mine, lr=0.1).load_state_dict(saved)


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_of_an_optimiser_keep_time(duplicate, dtype, steps):
    params = two(dtype)
    optimiser = LaProp(params, lr=1.0, prior_decay=0.5)
    run(optimiser, params, steps)
    others, other = duplicate((params, optimiser))
    run(optimiser, params, 4, first=4)
    run(other, others, 4, first=4)
    assert all(map(torch.equal, params, others))
    assert other.state[others[0]]["step"] == steps + 4, "a view of the clock"
    assert other.param_groups[0]["rate_average"] == optimiser.param_groups[0]["rate_average"]


def test_to_tensors_survives_safetensors_and_json(tmp_path):
    make = lambda: [nn.Parameter(numbers(5, 3, seed=i)) for i in range(2)]  # noqa: E731
    params, others = make(), make()
    names = lambda ps: {p: f"layer.{i}.weight" for i, p in enumerate(ps)}  # noqa: E731
    groups = lambda ps: [{"params": ps[:1], "prior_decay": 0.5}, {"params": ps[1:]}]  # noqa: E731
    straight = LaProp(groups(params), lr=torch.tensor(1.0), prior_dtype=torch.bfloat16)
    run(straight, params, 3)
    tensors, meta = straight.to_tensors(names(params))
    save_file(tensors, tmp_path / "o.safetensors")
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    meta = json.loads(json.dumps(meta))
    run(straight, params, 3, first=3)
    resumed = LaProp(groups(others), lr=1.0, prior_dtype=torch.bfloat16)
    resumed.from_tensors(names(others), load_file(tmp_path / "o.safetensors"), meta)
    run(resumed, others, 3, first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    with pytest.raises(ValueError, match="expected this model's parameter groups"):
        resumed.from_tensors({p: f"other.{i}" for i, p in enumerate(others)}, tensors, meta)


@pytest.mark.parametrize(("mine", "theirs"), [(0.5, 0.0), (0.0, 0.5), (0.5, 0.5)])
def test_a_missing_prior_is_never_made_anew(mine, theirs):
    saved = LaProp([nn.Parameter(numbers(3))], lr=0.1, prior_decay=theirs).state_dict()
    saved["state"][0].pop("prior", None)
    optimiser = LaProp([nn.Parameter(numbers(3))], lr=0.1, prior_decay=mine)
    with pytest.raises(ValueError, match="expected a prior for every parameter"):
        optimiser.load_state_dict(saved)


def test_the_prior_is_the_first_weight_not_the_resumed_one():
    p = nn.Parameter(numbers(3))
    first = p.detach().clone()
    optimiser = LaProp([p], lr=0.1, prior_decay=0.5)
    run(optimiser, [p], 5)
    resumed = LaProp([p], lr=0.1, prior_decay=0.5)  # built on weights that have moved
    resumed.load_state_dict(optimiser.state_dict())
    assert torch.equal(resumed.state[p]["prior"], first)


class Attention(nn.Module):
    """Two weights of one shape, in either order, and a frozen one."""

    def __init__(self, order="qk", dtype=torch.float32):
        super().__init__()
        for name in order:
            setattr(self, name, nn.Parameter(numbers(3, 3, seed=ord(name)).to(dtype)))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def train_with(self, optimiser, steps, first=0):
        run(optimiser, [self.q, self.k], steps, first)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1.0)


def laprop(model):
    return LaProp(model.parameters(), lr=1.0, **SETTINGS["both"])


def laprop_with_names(model):
    return LaProp(model.named_parameters(), lr=1.0, prior_dtype=torch.bfloat16, **SETTINGS["both"])


def laprop_in_groups(model):
    """The first has a prior, the second has none; the frozen parameter is in neither."""
    return LaProp(param_groups(model, prior_decay=0.5, no_decay=["k"]), lr=1.0)


def outcome(build, options, *, whole, order="qk", dtype=torch.float32):
    """The weights after a resumed run minus those of the undisturbed one, or PyTorch's error."""
    options = StateDictOptions(**options)
    straight, resumed = Attention(dtype=dtype), Attention(order, dtype)
    optimiser, other = build(straight), build(resumed)
    straight.train_with(optimiser, 3)
    if whole:
        model_state, state = copy.deepcopy(get_state_dict(straight, optimiser, options=options))
    else:
        model_state, state = (
            copy.deepcopy(straight.state_dict()),
            copy.deepcopy(get_optimizer_state_dict(straight, optimiser, options=options)),
        )
    straight.train_with(optimiser, 3, first=3)
    try:
        if whole:
            set_state_dict(resumed, other, model_state_dict=model_state, optim_state_dict=state, options=options)
        else:
            resumed.load_state_dict(model_state)
            set_optimizer_state_dict(resumed, other, state, options=options)
    except KeyError as error:  # PyTorch 2.13 cannot load a state that is both flattened and full
        return repr(error)
    resumed.train_with(other, 3, first=3)
    return [(getattr(resumed, name) - getattr(straight, name)).abs().max().item() for name in "qk"]


DCP_OPTIONS = [
    {"flatten_optimizer_state_dict": flatten, "full_state_dict": full, "cpu_offload": offload}
    for flatten, full, offload in itertools.product((False, True), repeat=3)
]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", DCP_OPTIONS, ids=lambda options: "".join("01"[on] for on in options.values()))
def test_pytorchs_distributed_checkpoints(options, dtype, whole):
    """States go through them as those of AdamW do: bit for bit, in any order of the parameters."""
    expected = outcome(adamw, options, whole=whole)
    assert expected == [0, 0] or "param_groups" in expected
    for build, order in [(laprop, "qk"), (laprop, "kq"), (laprop_with_names, "kq"), (laprop_in_groups, "kq")]:
        assert outcome(build, options, whole=whole, order=order, dtype=dtype) == expected


def test_an_old_state_of_distributed_checkpoints():
    """Its groups contained dtypes, and its keys were names."""
    straight, resumed = Attention(), Attention()
    optimiser, other = laprop(straight), laprop(resumed)
    straight.train_with(optimiser, 3)
    state = copy.deepcopy(get_optimizer_state_dict(straight, optimiser))
    state["param_groups"][0]["prior_dtype"] = torch.float32
    resumed.load_state_dict(straight.state_dict())
    set_optimizer_state_dict(resumed, other, state)
    straight.train_with(optimiser, 3, first=3)
    resumed.train_with(other, 3, first=3)
    assert torch.equal(resumed.q, straight.q)


def test_a_flattened_state_without_masters_or_priors():
    """Of the optimizer's entries, PyTorch makes empty dictionaries: masters are copied, priors are asked for."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    single, half = Attention(), Attention(dtype=torch.bfloat16)
    optimiser = LaProp(single.parameters(), lr=1.0)
    single.train_with(optimiser, 3)
    state = get_optimizer_state_dict(single, optimiser, options=options)
    other = LaProp(half.parameters(), lr=1.0)
    set_optimizer_state_dict(half, other, state, options=options)
    assert torch.equal(other.state[half.q]["master"], half.q.float())
    with torch.no_grad():
        half.q.copy_(single.q)  # weights that are loaded later count all the same
    half.train_with(other, 1, first=3)
    single.train_with(optimiser, 1, first=3)
    torch.testing.assert_close(half.q.float(), single.q, rtol=0.01, atol=0.01)
    with pytest.raises(ValueError, match="state_dict: expected a prior for every parameter"):
        set_optimizer_state_dict(single, laprop(single), state, options=options)


def test_names_are_compared():
    """Weights of one shape in another order would get each other's moments and priors."""
    model, other = Attention(), Attention("kq")
    saved = laprop_with_names(model).state_dict()
    assert saved["param_groups"][0]["param_names"] == ["q", "k", "frozen"]
    optimiser = laprop_with_names(other)
    before = optimiser.state[other.k]["prior"].clone()
    message = (
        r"state_dict: param_groups\[0\]: expected the state of 'k' as parameter 0, got that of 'q': .*; to load it by"
    )
    with pytest.raises(ValueError, match=message):
        optimiser.load_state_dict(copy.deepcopy(saved))
    assert torch.equal(optimiser.state[other.k]["prior"], before)
    with pytest.raises(ValueError, match=message):  # names as keys, not in this optimizer's order
        optimiser.load_state_dict(get_optimizer_state_dict(model, laprop(model)))
    laprop(other).load_state_dict(copy.deepcopy(saved))  # an optimizer without names, as ever
    for group in saved["param_groups"]:
        del group["param_names"]
    optimiser.load_state_dict(saved)  # forced
    assert torch.equal(optimiser.state[other.k]["prior"], model.q.bfloat16())
    assert optimiser.param_groups[0]["param_names"] == ["k", "q", "frozen"]


@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_names_of_wrapped_modules_are_the_same(wrapper):
    """Such as those of torch.compile and DistributedDataParallel."""
    model = Attention()
    saved = laprop_with_names(nn.ModuleDict({wrapper: model})).state_dict()
    assert saved["param_groups"][0]["param_names"][0] == f"{wrapper}.q"
    laprop_with_names(model).load_state_dict(saved)


def test_frozen_parameters_keep_their_state():
    """Distributed checkpoints leave theirs out."""
    model = Attention()
    optimiser = laprop(model)
    model.train_with(optimiser, 3)
    saved = copy.deepcopy(optimiser.state_dict())
    del saved["state"][2]
    prior = optimiser.state[model.frozen]["prior"].clone()
    optimiser.load_state_dict(saved)
    assert torch.equal(optimiser.state[model.frozen]["prior"], prior)
    assert optimiser.state[model.frozen]["step"] == 3


def test_dtypes_of_a_loaded_state_are_those_of_the_optimizer():
    """States that went through others may have other ones."""
    params = two()
    optimiser = LaProp(params, lr=1.0, prior_decay=0.5)
    run(optimiser, params, 4)
    saved = copy.deepcopy(optimiser.state_dict())
    for state in saved["state"].values():
        state.update({key: value.double() for key, value in state.items()})
    go_on(saved, params, optimiser, prior_decay=0.5)


def test_tensors_of_a_loaded_state_may_be_strided():
    params = two()
    optimiser = LaProp(params, lr=1.0, prior_decay=0.5)
    run(optimiser, params, 4)
    saved = copy.deepcopy(optimiser.state_dict())
    for state in saved["state"].values():
        state.update({key: value.t().contiguous().t() for key, value in state.items() if key != "step"})
    go_on(saved, params, optimiser, prior_decay=0.5)


def test_hooks_of_saving_and_loading():
    """Before saving and loading they may change the state; after, they see all of it."""
    params = two()
    optimiser = LaProp(params, lr=1.0)
    run(optimiser, params, 4)
    seen = []
    handles = [
        optimiser.register_state_dict_pre_hook(lambda o: seen.append("saving")),
        optimiser.register_state_dict_post_hook(lambda o, state: {"wrapped": state}),
        optimiser.register_load_state_dict_pre_hook(lambda o, state: state["wrapped"]),
        optimiser.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["step"].item())),
    ]
    saved = optimiser.state_dict()
    assert list(saved) == ["wrapped"]
    run(optimiser, params, 1, first=4)
    optimiser.load_state_dict(saved)
    assert seen == ["saving", 4]
    for handle in handles:
        handle.remove()
    go_on(saved["wrapped"], params, optimiser)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda s: [], TypeError, "expected a dictionary with state, a dict, got list"),
        (lambda s: {}, TypeError, "expected a dictionary with state, a dict, got None"),
        (lambda s: {"state": {}}, TypeError, "expected a dictionary with param_groups, a list, got None"),
        (lambda s: s["param_groups"].append({}), ValueError, "expected 1 groups of parameters, got 2"),
        (lambda s: s["param_groups"][0].pop("eps"), ValueError, r"param_groups\[0\]: expected eps, got none"),
        (
            lambda s: s["param_groups"][0].update(lr="x"),
            TypeError,
            r"param_groups\[0\]: lr: expected a number, got 'x'",
        ),
        (
            lambda s: s["param_groups"][0].update(betas=[0.9]),
            ValueError,
            r"param_groups\[0\]: betas: expected two numbers",
        ),
        (lambda s: s["param_groups"][0].update(params=[0]), ValueError, "expected the state of 2 parameters, got 1"),
        (
            lambda s: s["param_groups"][0].update(params=3),
            TypeError,
            "params: expected a list of numbers or names, got 3",
        ),
        (lambda s: s["param_groups"][0].update(params="ab"), TypeError, "params: expected a list of .*, got 'ab'"),
        (
            lambda s: s["param_groups"][0].update(params=[[1], 0]),
            TypeError,
            r"\[0\]: params\[0\]: expected a number or a name, got \[1\]",
        ),
        (
            lambda s: s["param_groups"][0].update(params=[0, 0]),
            ValueError,
            "params: expected every parameter once, got 0 2 times",
        ),
        (
            lambda s: s["param_groups"][0].update(param_names=3),
            TypeError,
            "param_names: expected a list of names, got 3",
        ),
        (
            lambda s: s["param_groups"][0].update(param_names=["a", 5]),
            TypeError,
            r"param_names\[1\]: expected a name, got 5",
        ),
        (
            lambda s: s["param_groups"][0].update(param_names=["a"]),
            ValueError,
            "param_names: expected 2 names, got 1",
        ),
        (
            lambda s: s.update(param_groups={0: {}}),
            TypeError,
            "expected a dictionary with param_groups, a list, got {0",
        ),
        (lambda s: s["state"].update({(0, 1): {}}), ValueError, r"got one of parameter \(0, 1\)"),
        (
            lambda s: s["state"][1].update({5: torch.ones(5, 3)}),
            TypeError,
            "state of parameter 1: expected names as keys, got 5",
        ),
        (
            lambda s: s["state"][1].update(exp_avg=torch.ones(5, 3).to_sparse()),
            ValueError,
            "exp_avg of parameter 1: expected a dense .* tensor, got layout torch.sparse_coo",
        ),
        (
            lambda s: s["state"][1].update(exp_avg=torch.ones(5, 3, device="meta")),
            ValueError,
            "exp_avg of parameter 1: expected a tensor on a device, got one on meta",
        ),
        (lambda s: s["param_groups"][0].update(rate_average=-1), ValueError, "rate_average: expected a number in"),
        (lambda s: s["state"].update({7: {}}), ValueError, "expected states of the groups' .*, got one of parameter 7"),
        (lambda s: s["state"].update({1: 7}), TypeError, "state of parameter 1: expected a dictionary, got 7"),
        (lambda s: s["param_groups"].__setitem__(0, 7), TypeError, r"param_groups\[0\]: expected a dictionary, got 7"),
        (lambda s: s["state"][0].update(step="x"), TypeError, "step: expected a number, got 'x'"),
        (lambda s: s["state"][1].update(prior=7), ValueError, "prior of parameter 1: expected a tensor, got int"),
        (
            lambda s: s["state"][1].update(exp_avg=torch.ones(5, 3, dtype=torch.int64)),
            ValueError,
            "exp_avg of parameter 1: expected float16 or .*, got int64",
        ),
    ],
)
def test_a_state_that_is_none_is_refused(spoil, error, message):
    params = two()
    optimiser = LaProp(params, lr=1.0, prior_decay=0.5)
    run(optimiser, params, 2)
    saved = copy.deepcopy(optimiser.state_dict())
    result = spoil(saved)
    with pytest.raises(error, match=f"^state_dict: .*{message}"):
        optimiser.load_state_dict(result if isinstance(result, dict | list) else saved)
    assert optimiser.state_dict()["state"][0]["step"] == 2


def test_from_tensors_goes_by_name():
    """In another order of the parameters, each has its own state; other groups are refused."""
    params, others = two(), two()
    names = lambda ps: {ps[0]: "q", ps[1]: "k"}  # noqa: E731
    optimiser, other = LaProp(params, lr=1.0, prior_decay=0.5), LaProp(others[::-1], lr=1.0, prior_decay=0.5)
    run(optimiser, params, 3)
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p)
    other.from_tensors(names(others), *optimiser.to_tensors(names(params)))
    run(optimiser, params, 3, first=3)
    run(other, others, 3, first=3)
    assert all(map(torch.equal, params, others))
    tensors, meta = optimiser.to_tensors(names(params))
    for groups, message in [
        ([{"params": others[:1]}, {"params": others[1:]}], "expected 2 groups of parameters, got 1"),
        ([{"params": others[:1]}], "expected .* got others: group 0: 1 unknown parameters, first 'k'"),
        (
            [{"params": [*others, nn.Parameter(torch.ones(1))]}],
            "expected .*: group 0: 1 of its .* missing, first 'new'",
        ),
    ]:
        last = LaProp(groups, lr=1.0)
        new = {p: "new" for p in last.param_groups[0]["params"]} | names(others)
        with pytest.raises(ValueError, match=f"optimizer state: {message}"):
            last.from_tensors(new, tensors, meta)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_keeps_what_was_written_into_a_half_precision_parameter(copied):
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimiser = LaProp([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    optimiser.step()
    with torch.no_grad():
        p[1] = 7.0
    again = copied(optimiser)
    (other,) = again.param_groups[0]["params"]
    other.grad = torch.zeros_like(other)
    again.step()
    assert other[1].item() == pytest.approx(7.0, rel=0.01)


def test_a_loaded_master_is_kept_by_a_parameter_cast_from_half_precision():
    """As by one that is cast after loading: its elements that equal the rounded master are the master's."""
    p = nn.Parameter(torch.linspace(0.1, 1.0, 7, dtype=torch.bfloat16))
    optimiser = LaProp([p], lr=1e-3)
    p.grad = torch.ones_like(p)
    optimiser.step()
    state = copy.deepcopy(optimiser.state_dict())
    q = nn.Parameter(p.detach().float())
    with torch.no_grad():
        q[2] = 3.0
    LaProp([q], lr=1e-3).load_state_dict(state)
    master = state["state"][0]["master"].clone()
    master[2] = 3.0
    assert torch.equal(q, master)
