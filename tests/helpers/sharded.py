"""One of two processes that train shards of one model (FSDP2, gloo, CPU): run by test_sharded.py.

    python sharded.py FOLDER

Exits with NO_GLOO and the reason where the processes cannot find each other.
"""

import copy
import itertools
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.two import SIZE, meeting
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from dph.optim import LaProp, gradient_norm

LIMIT = 0.5
RATES = [0.01, 0.02, 0.03, 0.0, 0.01]


def build():
    """The same weights everywhere; a second process has nothing of the last layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def shard(model):
    mesh = init_device_mesh("cpu", (SIZE,))
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh)
    return model


def make_optimiser(model):
    groups = [{"params": list(model[0].parameters()), "prior_decay": 0.5}, {"params": list(model[2].parameters())}]
    return LaProp(groups, lr=0.1)


def inputs(step, rank):
    return torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + rank))


def backward(model, step, ranks):
    """Gradients of the mean over ``ranks``; FSDP2 itself takes the mean over the processes."""
    model.zero_grad()
    sum(model(inputs(step, rank)).square().mean() for rank in ranks).div(len(ranks)).backward()


def update(model, optimiser, step):
    for group in optimiser.param_groups:
        group["lr"] = RATES[step]
    norm = gradient_norm(model.parameters(), LIMIT)
    optimiser.step(grad_scale=norm.scale)
    return norm


def whole(model):
    return [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]


def assert_same(sharded, plain):
    for one, two in zip(whole(sharded), whole(plain), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def train(rank):
    """Five steps, one of them spoilt on one rank only: shards and whole model agree, and so do the norms."""
    sharded, plain = shard(build()), build()
    optimisers = make_optimiser(sharded), make_optimiser(plain)
    empty = [p.to_local().numel() == 0 for p in sharded[2].parameters()]
    assert empty == [rank == 1, rank == 1], "the test means to have an empty shard"
    for step in range(len(RATES)):
        backward(sharded, step, [rank])
        backward(plain, step, range(SIZE))
        if step == 2:
            before = whole(sharded)
            if rank == 0:
                sharded[2].bias.grad.to_local().fill_(math.nan)
            assert not update(sharded, optimisers[0], step).finite, "a rank must hear of another's NaN"
            assert all(map(torch.equal, whole(sharded), before))
            continue
        norms = [update(m, o, step) for m, o in zip((sharded, plain), optimisers, strict=True)]
        for one, two in zip(*norms, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=0)
        assert_same(sharded, plain)
    return sharded, optimisers[0]


def replicate(model):
    """A replica counts once, beside shards and whole tensors."""
    mesh = model[0].weight.device_mesh
    plain, replica = nn.Parameter(torch.zeros(4)), nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()]))
    plain.grad, replica.grad = torch.full((4,), 3.0), distribute_tensor(torch.full((4,), 4.0), mesh, [Replicate()])
    shards = model[0].weight.grad.full_tensor().double().square().sum()
    norm = gradient_norm([plain, replica, model[0].weight]).norm
    torch.testing.assert_close(norm, (100 + shards).sqrt(), rtol=1e-6, atol=0)


def resume(rank, model, optimiser, folder):
    """Save by PyTorch's distributed checkpoints, load into fresh shards, and go on bit for bit."""
    dcp.save({"optimiser": get_optimizer_state_dict(model, optimiser)}, checkpoint_id=folder / "checkpoint")
    fresh = shard(build())
    with torch.no_grad():
        for one, two in zip(fresh.parameters(), model.parameters(), strict=True):
            one.to_local().copy_(two.to_local())
    resumed = make_optimiser(fresh)
    state = {"optimiser": get_optimizer_state_dict(fresh, resumed)}
    dcp.load(state, checkpoint_id=folder / "checkpoint")
    set_optimizer_state_dict(fresh, resumed, state["optimiser"])
    for step in (0, 1):
        for m, o in ((model, optimiser), (fresh, resumed)):
            backward(m, step, [rank])
            update(m, o, step)
    assert [c.tolist() for c in resumed._clocks] == [c.tolist() for c in optimiser._clocks]
    assert resumed._clocks[0][0] == 6
    assert all(map(torch.equal, whole(fresh), whole(model)))
    assert all("prior" in resumed.state[p] for p in fresh[0].parameters())


def outcome(build_optimiser, rank, options, loading):
    """Whether a run that went through a state goes on bit for bit."""
    straight, resumed = shard(build()), shard(build())
    optimiser, other = build_optimiser(straight), build_optimiser(resumed)
    for step in (0, 1):
        backward(straight, step, [rank])
        optimiser.step()
    state = copy.deepcopy(get_state_dict(straight, optimiser, options=StateDictOptions(**options)))
    # Not by set_state_dict, which takes the empty state of a rank for one without a model.
    set_model_state_dict(resumed, state[0], options=StateDictOptions(**options, **loading))
    set_optimizer_state_dict(resumed, other, state[1], options=StateDictOptions(**options, **loading))
    for m, o in ((straight, optimiser), (resumed, other)):
        backward(m, 2, [rank])
        o.step()
    return all(map(torch.equal, whole(straight), whole(resumed)))


def go_through_states(rank):
    """LaProp's state goes through PyTorch's tools as AdamW's does: whole or sharded, flattened, by the CPU."""

    def adamw(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01)

    def laprop(model):
        return LaProp(model.named_parameters(), lr=0.01, prior_decay=0.5)

    for flatten, full, offload in itertools.product((False, True), repeat=3):
        if flatten and full:  # PyTorch 2.13 cannot load it: a KeyError, on one rank only if rank 0 broadcasts
            continue
        options = {"flatten_optimizer_state_dict": flatten, "full_state_dict": full, "cpu_offload": offload}
        loading = {"broadcast_from_rank0": True} if full and offload else {}  # only rank 0 has that state
        assert outcome(adamw, rank, options, loading), f"the test itself: {options}"
        assert outcome(laprop, rank, options, loading), options


def exchange(rank):
    """Parameters that FSDP2 exchanges after the optimizer was built, as accelerate's preparation does."""
    sharded, plain = build(), build()
    groups = [{"params": list(sharded[0].parameters()), "prior_decay": 0.5}, {"params": list(sharded[2].parameters())}]
    optimisers = LaProp(groups, lr=0.1), make_optimiser(plain)
    optimisers[0].load_state_dict(optimisers[0].state_dict())  # accelerate's wrapper does this first
    shard(sharded)
    for group, module in zip(optimisers[0].param_groups, (sharded[0], sharded[2]), strict=True):
        group["params"] = list(module.parameters())
    for step in range(2):
        backward(sharded, step, [rank])
        backward(plain, step, range(SIZE))
        for m, o in zip((sharded, plain), optimisers, strict=True):
            update(m, o, step)
        assert_same(sharded, plain)
    assert len(optimisers[0].state) == 4


def refuse(model, optimiser):
    """What does not go with shards says so."""
    whole_state = make_optimiser(build()).state_dict()
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0: expected sharding \(DeviceMesh.*, got None"):
        optimiser.load_state_dict(whole_state)
    with pytest.raises(ValueError, match="grad_scale: expected a plain tensor, got a DTensor"):
        optimiser.step(grad_scale=distribute_tensor(torch.ones(1), model[0].weight.device_mesh, [Replicate()]))
    with pytest.raises(ValueError, match="to_mixed_precision: expected whole parameters, got sharded ones"):
        optimiser.to_mixed_precision(torch.bfloat16)
    model[0].weight.grad = DTensor.from_local(torch.ones(5, 7), model[0].weight.device_mesh, [Partial()])
    with pytest.raises(ValueError, match="grads: expected sharded or replicated gradients, got"):
        gradient_norm([model[0].weight])


def main(folder):
    with meeting():
        dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    rank = dist.get_rank()
    model, optimiser = train(rank)
    replicate(model)
    resume(rank, model, optimiser, folder)
    go_through_states(rank)
    exchange(rank)
    refuse(model, optimiser)
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # All is shown. At Python's end a thread of PyTorch's that still wants the interpreter would abort the process.
    sys.stdout.flush()
    os._exit(0)
