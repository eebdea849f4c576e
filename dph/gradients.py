"""The norm of all gradients, whole or sharded by FSDP2, and what clips it."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

import dph_kernels
from dph_kernels import GradientNorm


@torch.no_grad()
def gradient_norm(params: Iterable[Tensor], limit: float = math.inf) -> GradientNorm:
    """Norm of all gradients together, the coefficient that brings it down to ``limit``, and whether it is finite.

    All three lie on the gradients' device, without a wait for them; ``scale`` is for ``LaProp.step(grad_scale=...)``.
    Where parameters are sharded, every rank has to call this, and all get the same.
    """
    parts: dict[tuple | None, list[Tensor]] = {}
    for grad in (p.grad for p in params if p.grad is not None):
        parts.setdefault(sharding(grad), []).append(local(grad).contiguous())
    if parts.keys() <= {None}:
        return dph_kernels.gradient_norm(parts.get(None, []), max_norm=limit)
    squares = [_over_ranks(dph_kernels.gradient_norm(grads).norm.square(), where) for where, grads in parts.items()]
    norm = torch.stack(squares).sum().sqrt()
    finite = norm.isfinite()
    scale = torch.where(finite, torch.where(norm > limit, limit / norm, 1.0), math.nan)
    return GradientNorm(norm, scale.float().reshape(1), finite)


def _over_ranks(squares: Tensor, where: tuple | None) -> Tensor:
    """Add what the ranks have that hold other shards; a whole tensor, or a replica of a shard, counts once."""
    if where is not None:
        mesh, placements = where
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                torch.distributed.all_reduce(squares, group=mesh.get_group(dim))
            elif not placement.is_replicate():
                raise ValueError(f"grads: expected sharded or replicated gradients, got {placement}")
    return squares


def sharding(tensor: Tensor) -> tuple | None:
    """Mesh and placements of a sharded tensor (DTensor); None for a plain one."""
    return (tensor.device_mesh, tuple(tensor.placements)) if hasattr(tensor, "to_local") else None


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, the same memory; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
