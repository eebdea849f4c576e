"""LaProp's state: saved and loaded in PyTorch's layout and in that of checkpoints, and refused if incomplete."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_optim import SETTINGS, numbers, run, two
from torch import nn

from dph.optim import LaProp


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
    assert all(t.dtype == torch.float32 for s in resumed.state.values() for t in s.values())
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
    assert resumed.state_dict()["param_groups"][0]["prior_dtype"] == torch.float32
    assert "step" not in resumed.param_groups[0]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s["state"][1].update(step=torch.tensor(5.0)), r"expected one step for all parameters.*(4|5)\.0, "),
        (lambda s: s["state"][1].pop("step"), "expected one step for all parameters of a group, got .*None"),
        (lambda s: s["param_groups"][0].pop("rate_average"), "expected one rate_average for all parameters"),
        (lambda s: s["state"].pop(1), "expected one step for all parameters"),
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


def test_copies_of_an_optimiser_keep_time():
    params = two()
    optimiser = LaProp(params, lr=1.0, prior_decay=0.5)
    run(optimiser, params, 4)
    other = copy.deepcopy(optimiser)
    others = other.param_groups[0]["params"]
    run(optimiser, params, 4, first=4)
    run(other, others, 4, first=4)
    assert all(map(torch.equal, params, others))


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
