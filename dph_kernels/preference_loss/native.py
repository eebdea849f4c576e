"""The joint preference objective by csrc/cpu/preference_loss.cpp: fp32 or bf16 as it lies in memory, fp32 inside."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dph_kernels import native
from dph_kernels.preference_loss import reference
from dph_kernels.preference_loss.reference import Options, sizes

KNOWN = {torch.float32, torch.bfloat16}


def forward(rewards: Sequence[Tensor], logprobs: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives."""
    inputs = (*rewards, *logprobs)
    if not {x.dtype for x in inputs} <= KNOWN:
        inputs = tuple(x if x.dtype in KNOWN else x.float() for x in inputs)
    count, room = sizes(rewards, logprobs)
    loss = torch.empty((), dtype=torch.float32, device="cpu")
    metrics = torch.empty(count, dtype=torch.float32, device="cpu")
    slopes = torch.empty(room, dtype=torch.float32, device="cpu")
    native.module().preference_loss_cpu(inputs, len(rewards), options, loss, metrics, slopes, native.threads())
    return loss, metrics, slopes


def backward(slopes: Tensor, grad: Tensor, judged: Sequence[Tensor]) -> list[Tensor]:
    """What ``reference.backward`` gives."""
    kind = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
    grads = [torch.empty_like(x, **kind) for x in judged]
    if native.module().preference_loss_gradients_cpu(slopes, grad, grads, native.threads()):
        return grads
    return reference.backward(slopes, grad, judged)  # a batch of gradients (vmap), or what hooks have changed
