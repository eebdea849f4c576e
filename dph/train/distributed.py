"""Several processes that train one model, each on its share of every update.

    torchrun --nproc-per-node 8 -m dph.cli train sft model.path=runs/vocab

Every process walks the same records in the same order and computes its own streams or pairs of each update; gradients
are summed over the processes, and the weights, the optimiser's state and the gradients lie in shards (FSDP2), or whole
in every process (``parallel: replicate``). What a step decides, it decides on sums over all processes, so that all
decide the same: a SIGTERM to one of them stops all, after the same step (torchrun passes it on, and kills what has not
ended 30 seconds later). One process alone has nothing of this: no group, no wrapper, no collective.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dph import devices
from dph.errors import Elsewhere, UserError
from dph.gradients import sharding

if TYPE_CHECKING:  # what of torch.distributed a PyTorch built without it lacks is imported where it is used
    from torch.distributed.device_mesh import DeviceMesh

FORWARD = ("forward_packed", "stream_logprobs", "reward_states", "rewards_of")
"""What the stages call in a model: each gathers the weights that it needs and lets them go."""

TOLD = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun, beside WORLD_SIZE

_starts = itertools.count()  # a store remembers: groups that follow one another in a process must not meet in it


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them; made by :func:`start`.

    Attributes:
        rank: which one this is, from 0.
        size: how many there are.
        here: how many of them run on this machine.
        mesh: of their devices; None where this one is alone.
    """

    rank: int = 0
    size: int = 1
    here: int = 1
    mesh: DeviceMesh | None = None

    @property
    def device(self) -> torch.device | None:
        """The current one of the kind that they compute on; None, which leaves it to the recipe, for one alone."""
        return None if self.mesh is None else torch.device(self.mesh.device_type)

    # On the device: nothing here makes the host wait for it

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    # Between the hosts

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def any(self, flag: bool) -> bool:
        """Whether one process says yes."""
        return any(self.gather(flag))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block after which all processes go on, or none: where it failed in one, the others raise Elsewhere."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = [rank for rank, failed in enumerate(self.gather(error is not None)) if failed]
        if error is not None:
            raise error
        if failed:
            raise Elsewhere(f"process {failed[0]} failed, and says why")

    # Models

    def shard(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Leave to each process its shard of ``model``, on its device; blocks are gathered as they run.

        With ``dtype`` (bf16) weights are gathered, and computed with, in it; gradients are summed in fp32 either way.
        Nothing is kept gathered between two calls: what ``named_parameters`` gives are the shards.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        # PyTorch warns of outputs that are views, lest they be changed in place: here they are not.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        for module in [*model.backbone.blocks, *model.heads.values(), model]:
            # The cached states that a head judges are fp32, as are the shards.
            policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=module in model.heads.values()
            )
            fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        for name in FORWARD:
            register_fsdp_forward_method(model, name)
        model.computes_in = dtype or model.dtype
        return model

    def last_part(self, model: nn.Module, last: bool) -> None:
        """Whether the next backward pass is the update's last: replicas then exchange their gradients, once an update.

        Shards exchange theirs after every part: to keep them whole until the last would take as much memory as whole
        weights.
        """
        if self.size > 1:
            model.set_requires_all_reduce(last)


SINGLE = World()
"""One process alone."""


def told() -> World:
    """The processes of which torchrun told this one, without meeting them: for figures.

    Raises UserError where another launcher told it but a part.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return SINGLE
    if lacking := [name for name in TOLD if name not in os.environ]:
        raise UserError(f"WORLD_SIZE: expected {', '.join(lacking)} beside it, as torchrun sets them, got {size} alone")
    return World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_WORLD_SIZE"]))


@contextlib.contextmanager
def start(parallel: str, device: str) -> Iterator[World]:
    """The processes that torchrun started, or this one alone.

    Where an error leaves the block in several of them, the first says why, and the others raise Elsewhere; torchrun
    then ends those that still wait for a process that has gone.

    Args:
        parallel: "shard" or "replicate" (``recipe.parallel``).
        device: "auto", "cpu" or "cuda": each process takes the GPU of its ``LOCAL_RANK``.

    Raises UserError for another device, and where another launcher started them.
    """
    if told().size == 1:
        yield SINGLE
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.rendezvous import rendezvous

    kind = _device(device)
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"dph/{next(_starts)}", store)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # hosts talk by gloo, so that no device has to wait
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    shape, names = ((size, 1), ("replicate", "shard")) if parallel == "replicate" else ((size,), ("shard",))
    try:
        yield World(rank, size, told().here, init_device_mesh(kind, shape, mesh_dim_names=names))
    except Exception as error:
        if isinstance(error, Elsewhere) or not _first(store):
            raise Elsewhere("another process failed, and says why") from error
        raise
    dist.destroy_process_group()  # not after an error: it would wait for those that wait for this one


def _device(name: str) -> str:
    """The kind of device; on GPUs, takes this process's."""
    kind = devices.choose(name)
    if ":" in kind:
        raise UserError(f"device: expected auto, cpu or cuda where several processes train, got {name!r}")
    if kind == "cuda":
        torch.cuda.set_device(devices.choose(f"cuda:{os.environ['LOCAL_RANK']}", "LOCAL_RANK"))
    return kind


def _first(store: dist.Store) -> bool:
    """Whether no other process has failed before."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # it lay with a process that has gone, which under torchrun it does not: rather say it twice
        return True


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole of a tensor of which each process has a shard, in each of them; all have to call this."""
    full = tensor.detach() if sharding(tensor) is None else tensor.detach().full_tensor()
    return full.to(dtype or full.dtype)


def computes_in(model: nn.Module) -> torch.dtype:
    """What a model computes in: the type of its weights, or that in which :meth:`World.shard` has them gathered."""
    return getattr(model, "computes_in", model.dtype)


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, where ``like`` lies in shards; without a word to the others."""
    if sharding(like) is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
