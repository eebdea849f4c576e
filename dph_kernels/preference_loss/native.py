"""The joint preference objective by csrc/cpu/preference_loss.cpp: fp32 or bf16 as it lies in memory, fp32 inside."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dph_kernels import native
from dph_kernels.preference_loss.reference import Options, sizes

KNOWN = {torch.float32, torch.bfloat16}


def forward(rewards: Sequence[Tensor], logprobs: Sequence[Tensor], options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """What ``reference.forward`` gives."""
    inputs = (*rewards, *logprobs)
    if not {x.dtype for x in inputs} <= KNOWN:
        inputs = tuple(x if x.dtype in KNOWN else x.float() for x in inputs)
    table: list[int] = []
    for x in inputs:  # `PreferenceInput` of csrc/preference_loss.h, four words each
        strides = x.stride()
        table += x.data_ptr(), strides[0], strides[-1], x.dtype is torch.bfloat16
    first, (count, room) = inputs[0], sizes(rewards, logprobs)
    pairs, *heads = first.shape
    loss = first.new_empty((), dtype=torch.float32)
    metrics = first.new_empty(count, dtype=torch.float32)
    slopes = first.new_empty(room, dtype=torch.float32)
    *numbers, objective = options
    native.module().preference_loss_cpu(
        table,
        len(rewards),
        pairs,
        *(heads or (1,)),
        *numbers,
        objective == "contrastive",
        loss.data_ptr(),
        metrics.data_ptr(),
        slopes.data_ptr(),
        native.threads(),
    )
    return loss, metrics, slopes
