"""The joint preference objective on the GPU: one launch, or two where there are many pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dph_kernels.launches import Launch, cdiv, signature
from dph_kernels.native import device_guard
from dph_kernels.preference_loss import reference
from dph_kernels.preference_loss import triton_kernels as kernels
from dph_kernels.preference_loss.reference import Options, sizes

BLOCK, WARPS = 1024, 8
GROUP = 4096  # pairs of one program: as many go in a single launch
TENSORS = (
    "rewards_chosen",
    "rewards_rejected",
    "policy_chosen",
    "policy_rejected",
    "reference_chosen",
    "reference_rejected",
)


def forward(rewards: Sequence[Tensor], logprobs: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives."""
    device = (*rewards, *logprobs)[0].device
    loss, metrics, slopes = (
        torch.empty(size, dtype=torch.float32, device=device) for size in ((), *sizes(rewards, logprobs))
    )
    with device_guard(device):
        for programs, arguments, constants in _launches(rewards, logprobs, options, loss, metrics, slopes):
            kernels.preference_loss[(programs,)](
                **arguments, **constants, num_warps=WARPS, num_stages=1, enable_fp_fusion=True
            )
    return loss, metrics, slopes


backward = reference.backward  # one product: nothing to fuse


def _launches(
    rewards: Sequence[Tensor], logprobs: Sequence[Tensor], options: Options, loss: Tensor, metrics: Tensor,
    slopes: Tensor,
) -> Iterator[tuple[int, dict[str, Any], dict[str, Any]]]:  # fmt: skip
    """(programs, arguments, constants) of each launch."""
    pairs, *heads = (*rewards, *logprobs)[0].shape
    heads = heads[0] if heads else 1
    tensors = (*(rewards or (slopes,) * 2), *(logprobs or (slopes,) * 4))  # for those that are off, any address
    strides = {f"{name}_row": x.stride(0) for name, x in zip(TENSORS, tensors, strict=True)}
    strides |= {f"{name}_head": x.stride(-1) for name, x in zip(TENSORS, rewards or tensors[:2], strict=False)}
    programs = cdiv(pairs, GROUP)
    width = len(rewards) // 2 * heads + len(logprobs) // 4
    sums = loss if programs == 1 else loss.new_empty(programs, width, 5)
    arguments = {
        **dict(zip(TENSORS, tensors, strict=True)), **strides,
        "loss": loss, "metrics": metrics, "slopes": slopes, "sums": sums,
        "N": pairs, "K": heads, "group": GROUP, "programs": programs,
        **{name: float(value) for name, value in options._asdict().items() if name != "objective"},
        "dpo_scale": options.dpo_weight * options.beta / pairs, "dph_scale": options.dph_weight / (pairs * heads),
    }  # fmt: skip
    constants = {
        "DPH": bool(rewards), "DPO": bool(logprobs), "CONTRASTIVE": options.objective == "contrastive", "B": BLOCK,
    }  # fmt: skip
    if programs == 1:
        yield 1, arguments, constants | {"PARTIAL": False, "FINAL": False}
        return
    yield programs, arguments, constants | {"PARTIAL": True, "FINAL": False}
    yield 1, arguments, constants | {"PARTIAL": False, "FINAL": True}


def launches(capability: int) -> list[Launch]:
    """For the audit: few and many pairs, every dtype, either part off, both objectives; the same on any GPU."""
    found: dict[tuple, Launch] = {}
    for dtype, rewards, logprobs, objective in (
        (torch.float32, 2, 4, "separable"),
        (torch.bfloat16, 2, 4, "contrastive"),
        (torch.bfloat16, 2, 0, "separable"),
        (torch.float16, 0, 4, "separable"),
    ):
        for pairs in (64, 2 * GROUP):
            inputs = [torch.empty(pairs, dtype=dtype, device="meta") for _ in range(rewards + logprobs)]
            for launch in _record(inputs[:rewards], inputs[rewards:], objective):
                found.setdefault(launch.key(), launch)
    return list(found.values())


def _record(rewards: list[Tensor], logprobs: list[Tensor], objective: str) -> list[Launch]:
    outputs = [torch.empty(1, device="meta") for _ in range(3)]
    options = Options(0.5, 0.25, 0.1, 1.0, 1.0, objective)
    found = []
    for _, arguments, constants in _launches(rewards, logprobs, options, *outputs):
        stage = "partial" if constants["PARTIAL"] else "final" if constants["FINAL"] else "whole"
        parts = "+".join(name for name in ("DPH", "DPO") if constants[name]).lower()
        dtype = str((*rewards, *logprobs)[0].dtype).removeprefix("torch.")
        found.append(
            Launch(
                name=f"preference_loss {dtype} {parts} {objective} {stage}",
                kernel=kernels.preference_loss,
                signature=signature(kernels.preference_loss, arguments, constants),
                constants=constants,
                aligned=tuple(name for name, value in arguments.items() if isinstance(value, Tensor)),
                num_warps=WARPS,
                num_stages=1,
            )
        )
    return found
