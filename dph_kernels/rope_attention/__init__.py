"""Rotary attention over a packed layout: shared prompts, memory and decoding are the same operator."""

from typing import Any

import torch
from torch import Tensor

from dph_kernels import autocast, checks, dispatch
from dph_kernels.direct import Operator
from dph_kernels.layout import PackedLayout, Rotary


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout,
    *,
    rope: Rotary,
    memory: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    return_keys: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every segment of ``layout``: its prefix completely, its own keys causally.

    Equivalent to ``softmax(mask(rot(q) rot(k)^T * scale)) v`` with ``mask = layout.visible()`` and keys
    ``[memory; rot(k)]``, but nothing is concatenated, padded or repeated, and each key is rotated once.

    Args:
        q: [T, H, D] queries, before rotation; D even.
        k: [S, H, D] new keys, before rotation.
        v: [S, H, D] new values.
        layout: who may look at what, with T queries, S new keys and M memory rows.
        rope: rotary embedding; positions come from the layout.
        memory: rotated keys and values [M, H, D] from earlier segments; detached: they get no gradient.
        scale: factor on the scores; D ** -0.5 if None.
        return_keys: also return the rotated keys [S, H, D] (detached), to be kept as memory.
        backend: "auto", or a backend by name (raises where it cannot run).

    Returns:
        [T, H, D] in the dtype of ``q``; rows of padding and rows that see no key are zero. With ``return_keys`` also
        the rotated keys.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.

    Rows are computed in tiles, and a hidden value counts as zero times itself: infinities and NaN in ``v`` may reach
    other rows of their tile, also those that do not see them. All results are the same in every run, bit for bit.

    Under ``torch.autocast`` queries, keys, values and memory are cast to its dtype.

    Source: RoFormer (arXiv 2104.09864), Transformer-XL (arXiv 1901.02860), FlashAttention-2 (arXiv 2307.08691).
    """
    memory_k, memory_v = memory if memory is not None else (k[:0], v[:0])
    q, k, v, memory_k, memory_v = autocast.together(q, k, v, memory_k, memory_v)
    check_inputs(q, k, v, memory_k, memory_v, layout)
    head_dim = q.shape[-1]
    tables = layout.tables(rope, head_dim, torch.float64 if q.dtype == torch.float64 else torch.float32)
    tensors = q, k, v, memory_k.detach(), memory_v.detach(), layout.segments, *tables
    out, _, keys = OPERATOR(*tensors, head_dim**-0.5 if scale is None else float(scale), backend)
    return (out, keys) if return_keys else out


def check_inputs(q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, layout: PackedLayout) -> None:
    """ValueError that names the argument where a shape, dtype or device does not fit."""
    checks.shape("q", q, layout.queries, "H", "D")
    heads, head_dim = q.shape[1:]
    if head_dim % 2:
        raise ValueError(f"q: expected an even head dimension, got {head_dim}")
    checks.dtype("q", q, checks.FLOATS)
    sizes = {"k": layout.keys, "v": layout.keys, "memory[0]": layout.memory, "memory[1]": layout.memory}
    for (name, rows), tensor in zip(sizes.items(), (k, v, memory_k, memory_v), strict=True):
        checks.shape(name, tensor, rows, heads, head_dim)
        checks.dtype(name, tensor, q.dtype)
        checks.device(name, tensor, q.device)
    checks.device("layout", layout.query_positions, q.device)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    arguments = q, k, v, memory_k, memory_v, segments, q_cos, q_sin, k_cos, k_sin, scale
    return dispatch.call("forward", "rope_attention", q, backend, *arguments)


def _backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tables = q_cos, q_sin, k_cos, k_sin
    arguments = grad, q, rotated, v, memory_k, memory_v, out, lse, segments, *tables, scale
    return dispatch.call("backward", "rope_attention", q, backend, *arguments)


def _setup(ctx, inputs, output):  # noqa: ANN001, ANN202
    q, _, v, memory_k, memory_v, segments, *tables, scale, backend = inputs
    out, lse, rotated = output
    ctx.mark_non_differentiable(lse, rotated)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, rotated, v, memory_k, memory_v, out, lse, segments, *tables)
    ctx.scale, ctx.backend = scale, backend


def _gradients(ctx, grad, *_, backward):  # noqa: ANN001, ANN002, ANN202
    if grad is None:
        return (None,) * 12
    return (*backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend), *(None,) * 9)


OPERATOR = Operator("rope_attention", forward=_forward, backward=_backward, setup=_setup, gradients=_gradients)


@OPERATOR.operator.register_fake
def _(q, k, v, memory_k, memory_v, segments, q_cos, q_sin, k_cos, k_sin, scale, backend):  # noqa: ANN001, ANN202
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=q_cos.dtype), k.new_empty(k.shape)


@OPERATOR.backward_operator.register_fake
def _(grad, q, rotated, v, *_):  # noqa: ANN001, ANN002, ANN202
    return q.new_empty(q.shape), rotated.new_empty(rotated.shape), v.new_empty(v.shape)


def joined_gradients(grad: Tensor, *others: Any) -> Tensor:
    """[T, 3, H, D]: what ``OPERATOR.backward`` gives for as many keys as queries, as the product before takes it.

    A backend that can writes all three there; those of the others are put together.
    """
    q, backend = others[0], others[-1]
    module = dispatch.implementation("rope_attention", q.device, backend, q.dtype)
    if not (hasattr(module, "backward_into") and dispatch.unobserved([grad])):
        return torch.stack(OPERATOR.backward(grad, *others), 1)
    joined = torch.empty((len(q), 3, *q.shape[1:]), dtype=q.dtype, device=q.device)
    with dispatch.named("dph::rope_attention_backward"):
        dispatch.call("backward_into", "rope_attention", q, backend, joined.unbind(1), grad, *others[:-1])
    return joined
