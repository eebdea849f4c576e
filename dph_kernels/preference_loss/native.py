"""The joint preference objective by csrc/cpu/preference_loss.cpp: fp32 or bf16 as it lies in memory, fp32 inside."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dph_kernels import native
from dph_kernels.preference_loss import reference
from dph_kernels.preference_loss.reference import Options, sizes


def forward(rewards: Sequence[Tensor], logprobs: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives."""
    inputs = (*rewards, *logprobs)
    count, room = sizes(rewards, logprobs)
    loss = inputs[0].new_empty((), dtype=torch.float32)
    metrics, slopes = loss.new_empty(count), loss.new_empty(room)
    arguments = len(rewards), options, loss, metrics, slopes, native.threads()
    if not native.module().preference_loss_cpu(inputs, *arguments):
        native.module().preference_loss_cpu(tuple(x.float() for x in inputs), *arguments)
    return loss, metrics, slopes


def backward(slopes: Tensor, grad: Tensor, judged: Sequence[Tensor]) -> list[Tensor]:
    """What ``reference.backward`` gives."""
    grads = [slopes.new_empty(x.shape) for x in judged]
    if native.module().preference_loss_gradients_cpu(slopes, grad, grads, native.threads()):
        return grads
    return reference.backward(slopes, grad, judged)  # a batch of gradients (vmap), or what hooks have changed
