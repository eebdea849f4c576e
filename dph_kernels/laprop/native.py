"""LaProp by csrc/cpu/laprop.cpp and csrc/cuda/laprop.cu: all tensors in one call, each byte read or written once."""

import functools
import itertools
from array import array
from collections.abc import Iterable, Sequence
from operator import itemgetter

import torch
from torch import Tensor

from dph_kernels import native

SETTINGS = itemgetter(
    "lr", "beta1", "beta2", "eps", "weight_decay", "prior_decay", "bias_correction", "momentum_scale"
)  # in the order of LapropSettings (csrc/laprop.h)
TABLES = 64  # cached device tables, of about 20 KB for 300 parameters
BF16_GRAD, BF16_PRIOR = 1, 2  # of `kinds` in csrc/laprop.h


def forward(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    priors: Sequence[Tensor],
    copies: Sequence[Tensor],
    grad_scale: Tensor | None,
    clock: Tensor | None,
    rate: Tensor | None,
    **settings: float,
) -> None:
    """One step, in place; the settings are those of ``reference.forward``."""
    device, kernels = params[0].device, native.module()
    if device.type == "cpu":
        lists, numbers = (params, grads, exp_avg, exp_avg_sq, priors, copies), (grad_scale, clock, rate)
        return kernels.laprop_tensors_cpu(*lists, *numbers, SETTINGS(settings))
    columns = params, exp_avg, exp_avg_sq, grads, priors, copies
    words, chunks = _table(columns, grads, priors, kernels.LAPROP_CHUNK)
    with native.device_guard(device):
        table = _table_on(words, device)
        # The allocator may reuse its memory after the return: by then the kernel is queued on the same stream.
        coefficients = None
        if clock is not None:
            coefficients = torch.empty(kernels.LAPROP_COEFFICIENTS, dtype=torch.float32, device=device)
        arguments = kernels.LapropArguments(
            table=table.data_ptr(),
            count=len(params),
            chunks=chunks,
            grad_scale=native.pointer(grad_scale),
            clock=native.pointer(clock),
            rate=native.pointer(rate),
            coefficients=native.pointer(coefficients),
            **settings,
        )
        kernels.laprop_cuda(arguments, native.stream(device))
    return None


def gradient_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Same results as ``reference.gradient_norm``."""
    device, kernels = grads[0].device, native.module()
    norm = torch.empty((), dtype=torch.float64, device=device)
    scale = torch.empty(1, dtype=torch.float32, device=device)
    finite = torch.empty((), dtype=torch.bool, device=device)
    if device.type == "cpu":
        kernels.gradient_norm_tensors_cpu(grads, max_norm, norm, scale, finite)
        return norm, scale, finite
    words, chunks = _table([grads], grads, [], kernels.LAPROP_CHUNK)
    partials = torch.empty(chunks, dtype=torch.float64, device=device)
    with native.device_guard(device):
        table = _table_on(words, device)
        arguments = kernels.GradientNormArguments(
            table=table.data_ptr(),
            count=len(grads),
            chunks=chunks,
            max_norm=max_norm,
            partials=partials.data_ptr(),
            norm=norm.data_ptr(),
            scale=scale.data_ptr(),
            finite=finite.data_ptr(),
        )
        kernels.gradient_norm_cuda(arguments, native.stream(device))
    return norm, scale, finite


def _table(
    columns: Sequence[Sequence[Tensor]], grads: Sequence[Tensor], priors: Sequence[Tensor], chunk: int
) -> tuple[array, int]:
    """Return rows of ``LapropTensor`` or ``GradientTensor`` (csrc/laprop.h) as words, and the number of all chunks.

    A row holds an address of each of ``columns`` (0 for an empty list), the size, the number of chunks in the rows
    above, and the dtypes of gradient and prior.
    """
    count = len(grads)
    kinds, chunks_above, chunks = [0] * count, [], 0
    for i, grad in enumerate(grads):
        if grad.dtype == torch.bfloat16:
            kinds[i] = BF16_GRAD
    for i, prior in enumerate(priors):
        if prior.dtype == torch.bfloat16:
            kinds[i] += BF16_PRIOR
    sizes = list(map(Tensor.numel, grads))
    for size in sizes:
        chunks_above.append(chunks)
        chunks += -(-size // chunk)
    words: list[Iterable[int]] = []
    for tensors in columns:
        words.append(map(Tensor.data_ptr, tensors) if tensors else [0] * count)
    rows = zip(*words, sizes, chunks_above, kinds, strict=True)
    return array("q", itertools.chain.from_iterable(rows)), chunks


def _table_on(words: array, device: torch.device) -> Tensor:
    """Return the words as a tensor on a CUDA device."""
    stream = native.stream(device)
    if torch.cuda.is_current_stream_capturing():
        # Part of the graph, which writes it again at each replay: a cached table could be freed before the graph.
        return _write(words, device, stream)
    return _keep(words.tobytes(), device, stream)


@functools.lru_cache(maxsize=TABLES)
def _keep(words: bytes, device: torch.device, stream: int) -> Tensor:
    """Return a table on the device, cached by its content, so that it cannot be stale.

    The stream is part of the key, so that the table is read after it was written.
    """
    return _write(array("q", words), device, stream)


def _write(words: array, device: torch.device, stream: int) -> Tensor:
    table = torch.empty(len(words), dtype=torch.int64, device=device)
    native.module().cuda_write(words.buffer_info()[0], len(words), table.data_ptr(), stream)
    return table
