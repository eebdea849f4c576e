"""Launcher of the joint preference objective's Triton kernel: one launch, or two for many pairs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dph_kernels.launcher import (
    Launch,
    LaunchConfig,
    LaunchRecorder,
    TritonDevice,
    cdiv,
    distinct,
    strided,
    triton_device,
)
from dph_kernels.preference_loss import reference
from dph_kernels.preference_loss import triton_kernels as kernels
from dph_kernels.preference_loss.reference import Options, sizes

CONFIG = LaunchConfig(1, 1024, 0, num_warps=8, num_stages=1)
GROUP = 4096  # pairs per program; up to this number one launch is enough


def forward(*, rewards: Sequence[Tensor], logprobs: Sequence[Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.forward``."""
    gpu = triton_device((*rewards, *logprobs)[0].device)
    return _forward(gpu, rewards, logprobs, Options(**options))


backward = reference.backward  # one product: nothing to fuse


def _forward(
    gpu: TritonDevice, rewards: Sequence[Tensor], logprobs: Sequence[Tensor], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (*rewards, *logprobs)
    pairs = len(inputs[0])
    heads = inputs[0].shape[1] if inputs[0].ndim == 2 else 1
    programs, scored = cdiv(pairs, GROUP), len(rewards) // 2 * heads + len(logprobs) // 4
    loss, metrics, slopes, sums = (
        torch.empty(size, dtype=torch.float32, device=inputs[0].device)
        for size in ((), *sizes(rewards, logprobs), (programs, scored, 5) if programs > 1 else 0)
    )
    unused = (slopes, slopes)  # any address for the part that is off
    arguments = {
        "rewards": tuple(map(strided, rewards or unused)), "policy": tuple(map(strided, logprobs[:2] or unused)),
        "reference": tuple(map(strided, logprobs[2:] or unused)), "loss": loss, "metrics": metrics, "slopes": slopes,
        "sums": sums, "N": pairs, "K": heads, "group": GROUP, "programs": programs,
        "weights": _weights(options, pairs, heads),
    }  # fmt: skip
    constants = {
        "DPH": bool(rewards), "DPO": bool(logprobs), "CONTRASTIVE": options.objective == "contrastive",
        "B": CONFIG.block_n,
    }  # fmt: skip
    stages: list[dict[str, Any]] = [{"PARTIAL": False, "FINAL": False}]
    if programs > 1:
        stages = [{"PARTIAL": True, "FINAL": False}, {"PARTIAL": False, "FINAL": True}]
    for stage in stages:
        grid = (programs if stage["PARTIAL"] else 1,)
        gpu.launch(kernels.preference_loss, grid, CONFIG, arguments, constants | stage)
    return loss, metrics, slopes


def _weights(options: Options, pairs: int, heads: int) -> tuple[float, ...]:
    """Numbers of ``options``, then the weights of both parts' slopes."""
    *numbers, _ = options
    dpo_scale, dph_scale = options.dpo_weight * options.beta / pairs, options.dph_weight / (pairs * heads)
    return *map(float, numbers), dpo_scale, dph_scale


def launches(capability: int) -> list[Launch]:
    """Launches for the audit: few and many pairs, all dtypes, either part off, both objectives; the same on any GPU."""
    gpu = LaunchRecorder(capability)
    cases = [
        (torch.float32, 2, 4, "separable"),
        (torch.bfloat16, 2, 4, "contrastive"),
        (torch.bfloat16, 2, 0, "separable"),
        (torch.float16, 0, 4, "separable"),
    ]
    for (dtype, rewards, logprobs, objective), pairs in itertools.product(cases, (64, 2 * GROUP)):
        inputs = [torch.empty(pairs, dtype=dtype, device="meta") for _ in range(rewards + logprobs)]
        _forward(gpu, inputs[:rewards], inputs[rewards:], Options(0.5, 0.25, 0.1, 1.0, 1.0, objective))
    return distinct(gpu.launches)
