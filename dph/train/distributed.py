"""Distributed training: process group, sharded models, and partitioning of batches and memories across ranks.

    torchrun --nproc-per-node 8 -m dph.cli train sft model.path=runs/vocab

Every rank reads the same records in the same order and computes its own streams or pairs of each step; gradients are
summed over the ranks. Weights, optimizer state and gradients are sharded (FSDP2), or replicated (``parallel:
replicate``). Decisions within a step depend only on sums over all ranks, so that all ranks decide the same: a SIGTERM
to one rank stops all of them after the same step (torchrun forwards the signal, and kills processes that have not
ended 30 seconds later). A single process uses no process group, no wrapper and no collective.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dph import devices
from dph._optim_checks import sharding
from dph.errors import OtherRankFailed, UserError

if TYPE_CHECKING:  # a PyTorch built without distributed support lacks this module
    from torch.distributed.device_mesh import DeviceMesh

# Methods of a model that stages call: each gathers the weights that it needs, and frees them afterwards.
FORWARD_METHODS = ("forward_packed", "stream_logprobs", "reward_states", "rewards_of")

# Environment variables that torchrun sets together with WORLD_SIZE.
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Number of each process group in this process: consecutive groups need separate prefixes in the store.
_group_numbers = itertools.count()


@dataclass(frozen=True)
class World:
    """Ranks of a training run, as seen by one of them; created by :func:`init_distributed`.

    Attributes:
        rank: of this process, from 0.
        world_size: number of ranks.
        local_world_size: number of ranks on this machine.
        mesh: their devices; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def device(self) -> torch.device | None:
        """Current device of the mesh's type; None, which leaves the choice to the recipe, for a single process."""
        return None if self.mesh is None else torch.device(self.mesh.device_type)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place, without waiting for the device."""
        dist.all_reduce(tensor)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order, by way of the hosts."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on some rank."""
        return any(self.all_gather_object(flag))

    @contextlib.contextmanager
    def fail_together(self) -> Iterator[None]:
        """Context that raises on all ranks if it failed on one; OtherRankFailed on the ranks that did not fail."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        first = self.first_failed(error is not None)
        if error is not None:
            raise error
        if first is not None:
            raise OtherRankFailed(f"rank {first} failed, and reports the error")

    def first_failed(self, failed: bool) -> int | None:
        """Return the lowest rank with a true ``failed``, or None; waits for all ranks, which have to call this.

        One number by way of the hosts: cheap enough for every step, and without waiting for a device.
        """
        if self.world_size == 1:
            return self.rank if failed else None
        mark = torch.tensor([self.world_size - self.rank if failed else 0])
        dist.all_reduce(mark, op=dist.ReduceOp.MAX)
        return self.world_size - int(mark) if int(mark) else None

    def shard(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Replace the weights of ``model`` by this rank's shards, on its device; blocks are gathered as they run.

        With ``dtype`` (bf16) weights are gathered and used in that type; gradients are summed in fp32 in any case.
        Nothing stays gathered between two calls: ``named_parameters`` returns the shards.
        """
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        # PyTorch warns of outputs that are views, which must not be changed in place; they never are.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        heads = list(model.heads.values())
        for module in [*model.backbone.blocks, *heads, model]:
            # Heads read cached states, which are fp32 as the shards are.
            policy = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=module in heads
            )
            fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        for name in FORWARD_METHODS:
            register_fsdp_forward_method(model, name)
        model.compute_dtype = dtype or model.dtype
        return model

    def set_last_micro_batch(self, model: nn.Module, last: bool) -> None:
        """Announce whether the next backward pass is the step's last, after which replicas reduce their gradients.

        Shards reduce theirs after every micro-batch: accumulating full gradients would take as much memory as full
        weights.
        """
        model.set_requires_all_reduce(last)


SINGLE_PROCESS = World()


def torchrun_world() -> World:
    """Return the world that torchrun's environment variables describe, without connecting to the other ranks.

    Raises UserError if another launcher set only some of the variables.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return SINGLE_PROCESS
    if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE: expected {', '.join(missing)} together with it, as torchrun sets them, got {size} alone"
        )
    return World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_WORLD_SIZE"]))


@contextlib.contextmanager
def init_distributed(parallel: str, device: str) -> Iterator[World]:
    """Context with the process group that torchrun started, or with a single process.

    An error that leaves the context on several ranks is raised by the first of them; the others raise OtherRankFailed,
    and torchrun ends those that still wait for a process that has ended.

    Args:
        parallel: "shard" or "replicate" (``recipe.parallel``).
        device: "auto", "cpu" or "cuda": each rank takes the GPU of its ``LOCAL_RANK``.

    Raises UserError for another device, and if another launcher started the processes.
    """
    world = torchrun_world()
    if world.world_size == 1:
        yield SINGLE_PROCESS
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.rendezvous import rendezvous

    kind = _select_device(device)
    store, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(f"dph/{next(_group_numbers)}", store)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # objects travel by gloo, without waiting for a GPU
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    shape, names = ((size, 1), ("replicate", "shard")) if parallel == "replicate" else ((size,), ("shard",))
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    try:
        yield World(rank, size, world.local_world_size, mesh)
    except Exception as error:
        if isinstance(error, OtherRankFailed) or not _failed_first(store):
            raise OtherRankFailed("another rank failed, and reports the error") from error
        raise
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this one
    # A thread of gloo that frees a tensor while Python ends aborts the process (PyTorch's pull request 179291). Threads
    # end with the last reference to their group: caches of PyTorch keep the mesh, and models are in reference cycles.
    getattr(mesh, "_pg_registry", {}).clear()
    atexit.register(gc.collect)


def _select_device(name: str) -> str:
    """Return the type of the ranks' devices, and select this rank's GPU."""
    kind = devices.choose(name)
    if ":" in kind:
        raise UserError(f"device: expected auto, cpu or cuda when several processes train, got {name!r}")
    if kind == "cuda":
        torch.cuda.set_device(devices.choose(f"cuda:{os.environ['LOCAL_RANK']}", "LOCAL_RANK"))
    return kind


def _failed_first(store: dist.Store) -> bool:
    """Return whether no other rank has failed before this one."""
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:  # the store's process has ended, which torchrun prevents; two reports are better than none
        return True


# Sharded tensors


def full_tensor(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the full tensor of which every rank has a shard; all ranks have to call this."""
    full = tensor.detach() if sharding(tensor) is None else tensor.detach().full_tensor()
    return full.to(dtype or full.dtype)


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a full tensor if ``like`` is sharded, without communication."""
    if sharding(like) is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the type that a model computes in: of its weights, or of :meth:`World.shard`'s gathered weights."""
    return getattr(model, "compute_dtype", model.dtype)


# Partitioning across ranks


def partition_bins(bins: Sequence[list[int]], lengths: Sequence[int], rank: int, world_size: int) -> list[list[int]]:
    """Return the bins of a rank: every rank gets the same number of bins, of similar length, and no bin is left out.

    If the number of bins is not divisible by the number of ranks, the longest bins with several pairs are halved.

    Args:
        bins: indices of the pairs that go through the model together.
        lengths: tokens of each pair; the number of pairs is a multiple of ``world_size``.
    """
    if world_size == 1:
        return list(bins)

    def tokens(members: list[int]) -> int:
        return sum(lengths[index] for index in members)

    balanced = list(bins)
    while len(balanced) % world_size:
        longest = max((members for members in balanced if len(members) > 1), key=tokens)
        balanced.remove(longest)
        balanced += [longest[0::2], longest[1::2]]
    return sorted(balanced, key=tokens, reverse=True)[rank::world_size]  # bins computed at the same time are similar


def slice_memory_state(tensors: Mapping[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
    """Return the state (``Memory.state_dict``) of streams ``first`` to ``first + count``, taken from other memories.

    Args:
        tensors: states of memories under ``N/``; N grows with the number of the memory's first stream.

    Memories of one run differ only in their streams. Before the first step they have none.
    """
    numbers = sorted({int(key.split("/")[0]) for key in tensors})
    names = [key.split("/")[1] for key in tensors if key.startswith(f"{numbers[0]}/")]
    slices, start = [], 0  # of each memory that holds some of the streams
    for number in numbers:
        streams = len(tensors[f"{number}/seen"])
        low, high = max(first - start, 0), min(first + count - start, streams)
        if low < high:
            slices.append((number, slice(low, high)))
        start += streams
    state = {}
    for name in names:
        tensor = tensors[f"{numbers[0]}/{name}"]
        if tensor.ndim > 0 and slices:  # a scalar is the same in all memories
            rows = [tensors[f"{number}/{name}"][streams] for number, streams in slices]
            tensor = rows[0] if len(rows) == 1 else torch.cat(rows)
        state[name] = tensor
    return state
