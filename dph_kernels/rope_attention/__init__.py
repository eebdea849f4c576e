"""Rotary attention over a packed layout: shared prompts, memory and decoding are the same operator."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import checks, dispatch
from dph_kernels import native as extension
from dph_kernels.layout import PackedLayout, Rotary
from dph_kernels.operator import Gradient, Inputs, Operator
from dph_kernels.rope_attention.growing import GrowingLayout, attend


def rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PackedLayout | GrowingLayout,
    *,
    rope: Rotary,
    memory: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    return_keys: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention of all segments of ``layout``: to its prefix completely, to its own keys causally.

    Equivalent to ``softmax(mask(rot(q) rot(k)^T * scale)) v`` with ``mask = layout.visible()`` and keys
    ``[memory; rot(k)]``, but nothing is concatenated, padded or repeated, and each key is rotated once.

    With fewer key heads K than query heads H (grouped-query attention) the query head h attends to the key head
    ``h // (H // K)``, as with ``k.repeat_interleave(H // K, 1)``; gradients of keys and values are sums over the group.

    Args:
        q: [T, H, D] queries, before rotation; D even.
        k: [S, K, D] new keys, before rotation; K divides H.
        v: [S, K, D] new values.
        layout: the visibility of keys to queries, with T queries, S new keys and M memory rows. A growing one, for
            inference, needs a memory and no new keys.
        rope: rotary embedding; positions come from the layout.
        memory: rotated keys and values [M, K, D] of earlier segments; they get no gradient.
        scale: factor on the scores; D ** -0.5 if None.
        return_keys: also return the rotated keys [S, K, D] (detached), to be stored as memory.
        backend: "auto", or a backend by name (raises if it cannot run).

    Returns:
        [T, H, D] in the dtype of ``q``; rows of padding and rows without visible keys are zero. With ``return_keys``
        also the rotated keys.

    Raises:
        ValueError: a wrong shape, dtype or device.

    NaN and infinities reach the results and gradients of the rows that see them. Only on a GPU, where a tile of rows is
    computed at once and an invisible value multiplied by zero, may they reach the other rows of their tile. A row whose
    visible scores are all minus infinity is NaN.
    Results are the same in every run, bit for bit.

    Under ``torch.autocast`` queries, keys, values and memory are cast to its dtype.

    Source: RoFormer (arXiv 2104.09864), Transformer-XL (arXiv 1901.02860), FlashAttention-2 (arXiv 2307.08691),
    GQA (arXiv 2305.13245).
    """
    memory_k, memory_v = memory if memory is not None else (k[:0], v[:0])
    if isinstance(layout, GrowingLayout):
        checks.shape("k", k, 0, "K", "D")
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        out = attend(q, (memory_k, memory_v), layout, rope=rope, scale=scale, backend=backend)
        return (out, k.detach()) if return_keys else out
    q, k, v, memory_k, memory_v = checks.cast_together(q, k, v, memory_k, memory_v)
    check_inputs(q, k, v, memory_k, memory_v, layout)
    head_dim = q.shape[-1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q_cos, q_sin, k_cos, k_sin = layout.tables(rope, head_dim, dtype)
    out, _, keys = OPERATOR(
        q=q,
        k=k,
        v=v,
        memory_k=memory_k.detach(),
        memory_v=memory_v.detach(),
        segments=layout.segments,
        q_cos=q_cos,
        q_sin=q_sin,
        k_cos=k_cos,
        k_sin=k_sin,
        scale=head_dim**-0.5 if scale is None else float(scale),
        backend=backend,
    )
    return (out, keys) if return_keys else out


def check_inputs(q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, layout: PackedLayout) -> None:
    """Check shapes, dtypes and devices of attention's inputs."""
    if not torch.compiler.is_compiling() and extension.missing("cpu") is None:  # usually in one call
        sizes = layout.queries, layout.keys, layout.memory
        if extension.module().attention_fits(q, k, v, memory_k, memory_v, layout.query_positions, *sizes):
            return
    checks.shape("q", q, layout.queries, "H", "D")
    heads, head_dim = q.shape[1:]
    if head_dim % 2:
        raise ValueError(f"q: expected an even head dimension, got {head_dim}")
    checks.dtype("q", q, checks.FLOATS)
    checks.shape("k", k, layout.keys, "K" if heads else 0, head_dim)
    key_heads = k.shape[1]
    if heads and (not key_heads or heads % key_heads):
        raise ValueError(f"k: expected a number of heads that divides q's H = {heads}, got {key_heads}")
    sizes = {"k": layout.keys, "v": layout.keys, "memory[0]": layout.memory, "memory[1]": layout.memory}
    for (name, rows), tensor in zip(sizes.items(), (k, v, memory_k, memory_v), strict=True):
        checks.shape(name, tensor, rows, key_heads, head_dim)
        checks.dtype(name, tensor, q.dtype)
        checks.device(name, tensor, q.device)
    checks.device("layout", layout.query_positions, q.device)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, segments: Tensor,
    q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(output [T, H, D], log-sum-exp [T, H] in the unit of the backend, rotated keys [S, K, D])."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=q_cos.dtype), k.new_empty(k.shape)


def _fake_backward(
    grad: Tensor, q: Tensor, rotated: Tensor, v: Tensor, memory_k: Tensor, memory_v: Tensor, out: Tensor, lse: Tensor,
    segments: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    return q.new_empty(q.shape), rotated.new_empty(rotated.shape), v.new_empty(v.shape)


SAVED = (
    "q", "rotated", "v", "memory_k", "memory_v", "out", "lse", "segments", "q_cos", "q_sin", "k_cos", "k_sin"
)  # fmt: skip


def _setup(ctx: FunctionCtx, output: tuple[Tensor, Tensor, Tensor], inputs: Inputs) -> None:
    out, lse, rotated = output
    ctx.mark_non_differentiable(lse, rotated)
    ctx.set_materialize_grads(False)
    tensors = inputs | {"out": out, "lse": lse, "rotated": rotated}
    ctx.save_for_backward(*map(tensors.get, SAVED))
    ctx.scale = inputs["scale"]


def _compute(
    ctx: FunctionCtx,
    needs: Inputs,
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad: Tensor | None,
    *_: None,
) -> Inputs:
    if grad is None:
        return {}
    saved = dict(zip(SAVED, ctx.saved_tensors, strict=True))
    grads = backward(grad=grad, **saved, scale=ctx.scale)
    return dict(zip(("q", "k", "v"), grads, strict=True))


OPERATOR = Operator(
    "rope_attention",
    fake=_fake,
    like=itemgetter("q"),
    gradient=Gradient(
        setup=_setup, compute=_compute, fake=_fake_backward, like="q", constants=("memory_k", "memory_v")
    ),
)


def rotated_keys(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return keys [S, K, D] rotated by the angles of ``cos`` and ``sin`` [S, D/2], without gradient, as attention does.

    For a cache that attention then reads as memory.
    """
    implementation = dispatch.implementation("rope_attention", k.device.type, "auto", k.dtype)
    return implementation.rotate(k.detach(), cos, sin).to(k.dtype)


def split_heads(projected: Tensor, heads: int, key_heads: int) -> tuple[Tensor, ...]:
    """[T, (H + 2K) D] -> queries [T, H, D], keys and values [T, K, D], which are views."""
    return projected.unflatten(1, (heads + 2 * key_heads, -1)).split((heads, key_heads, key_heads), 1)


def joined_gradients(*, backend: str, **arguments: Any) -> Tensor:
    """Return the gradients of q, k and v as one tensor [T, H + 2K, D], for as many keys as queries.

    The arguments are those of ``OPERATOR.backward``. A backend that can writes all three into one tensor, which is the
    gradient of the product that q, k and v are slices of; the results of the others are concatenated.
    """
    q, key_heads = arguments["q"], arguments["v"].shape[1]
    checks.shape("v", arguments["v"], len(q), key_heads, q.shape[2])
    implementation = dispatch.implementation("rope_attention", q.device.type, backend, q.dtype)
    if not (hasattr(implementation, "backward_into") and dispatch.can_bypass_dispatcher([arguments["grad"]])):
        return torch.cat(OPERATOR.backward(**arguments, backend=backend), 1)
    sizes = q.shape[1], key_heads, key_heads
    joined = torch.empty((len(q), sum(sizes), q.shape[2]), dtype=q.dtype, device=q.device)
    with dispatch.profile_range(f"{OPERATOR.name}_backward"):
        dispatch.call(implementation.backward_into, q.device.type, {"results": joined.split(sizes, 1), **arguments})
    return joined
