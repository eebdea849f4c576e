"""Pooler and reward heads: rewards of answers from the hidden states at their ends."""

from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import checks, dispatch
from dph_kernels import native as extension
from dph_kernels.operator import Gradient, Inputs, Operator


def _fake(
    hidden: Tensor,
    reward: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    row_ids: Tensor | None,
    dropout: float,
    input_dropout: float,
    seed: int,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rewards [R, K], [x | g], pooled state), the last two empty if absent or not saved."""
    dtype, rows = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    name = "reference" if hidden.is_meta else backend
    device = "cpu" if hidden.is_meta else hidden.device.type
    kept_shapes = dispatch.implementation("swiglu_reward", device, name, hidden.dtype).kept_shapes
    projected, pooled = kept_shapes(rows, hidden.shape[1], 0 if w1 is None else w1.shape[0] // 2)
    shapes = (
        (rows, reward.shape[0]),
        projected if save and w1 is not None else (0,),
        pooled if save and w2 is not None else (0,),
    )
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_backward(
    grad: Tensor,
    hidden: Tensor,
    reward: Tensor,
    w1: Tensor | None,
    w2: Tensor | None,
    row_ids: Tensor | None,
    projected: Tensor,
    pooled: Tensor,
    dropout: float,
    input_dropout: float,
    seed: int,
    needs: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, reward, w1, b1, w2, b2)."""
    empty = (0,)
    shapes = (
        hidden.shape,
        reward.shape,
        empty if w1 is None else w1.shape,
        empty if w1 is None else w1.shape[:1],
        empty if w2 is None else w2.shape,
        empty if w2 is None else w2.shape[:1],
    )
    return tuple(hidden.new_empty(shape if need else empty) for shape, need in zip(shapes, needs, strict=True))


TRAINED = ("hidden", "reward", "w1", "b1", "w2", "b2")
SAVED = ("hidden", "reward", "w1", "w2", "row_ids")


def _setup(ctx: FunctionCtx, output: tuple[Tensor, Tensor, Tensor], inputs: Inputs) -> None:
    _rewards, projected, pooled = output
    if not inputs["save"] and any(ctx.needs_input_grad):
        raise ValueError("save: expected True if a gradient is needed, got False")
    ctx.mark_non_differentiable(projected, pooled)
    ctx.save_for_backward(*map(inputs.get, SAVED), projected, pooled)
    ctx.options = {"dropout": inputs["dropout"], "input_dropout": inputs["input_dropout"], "seed": inputs["seed"]}


def _compute(
    ctx: FunctionCtx, needs: Inputs, backward: Callable[..., tuple[Tensor, ...]], grad: Tensor, *_: Tensor
) -> Inputs:
    saved = dict(zip((*SAVED, "projected", "pooled"), ctx.saved_tensors, strict=True))
    needed = list(map(needs.get, TRAINED))
    values = backward(grad=grad, **saved, needs=needed, **ctx.options)
    grads = {}
    for name, value in zip(TRAINED, values, strict=True):
        if needs[name]:
            grads[name] = value
    return grads


OPERATOR = Operator(
    "swiglu_reward",
    fake=_fake,
    like=itemgetter("hidden"),
    gradient=Gradient(setup=_setup, compute=_compute, fake=_fake_backward, like="hidden"),
)


def _check(name: str, tensor: Tensor | None, like: Tensor, *sizes: int | str) -> None:
    if tensor is not None:
        checks.shape(name, tensor, *sizes)
        checks.dtype(name, tensor, like.dtype)
        checks.device(name, tensor, like.device)


def _check_weights(
    hidden: Tensor, reward: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None, b2: Tensor | None
) -> None:
    is_native = not torch.compiler.is_compiling() and extension.missing("cpu") is None
    if is_native and extension.module().swiglu_reward_fits(hidden, reward, w1, b1, w2, b2):  # usually
        return
    checks.shape("hidden", hidden, "R", "C")
    checks.dtype("hidden", hidden, checks.FLOATS)
    columns = hidden.shape[1]
    _check("reward", reward, hidden, "K", columns)
    if reward.shape[0] == 0:
        raise ValueError(f"reward: expected at least one reward vector (K >= 1), got shape {list(reward.shape)}")
    for weight, bias, name in ((w1, b1, "1"), (w2, b2, "2")):
        if weight is None and bias is not None:
            raise ValueError(f"b{name}: expected None if w{name} is None, got a tensor")
    if w1 is not None and w2 is None:
        raise ValueError("w2: expected a tensor [C, F] with w1, got None")
    width = columns
    if w1 is not None:
        _check("w1", w1, hidden, "2F", columns)
        if w1.shape[0] % 2 or not w1.shape[0]:
            raise ValueError(f"w1: expected an even, positive number of rows ([x | gate], 2F), got {w1.shape[0]}")
        _check("b1", b1, hidden, w1.shape[0])
        width = w1.shape[0] // 2
    _check("w2", w2, hidden, columns, width)
    _check("b2", b2, hidden, columns)


def swiglu_reward(
    hidden: Tensor,
    reward: Tensor,
    *,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    seed: int = 0,
    row_ids: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Rewards of R answers under K heads that share one pooler (arXiv 2405.20053, section 3.1)::

        x, g = (drop(hidden) @ w1.T + b1).chunk(2, -1)       # drop: input_dropout
        f = tanh((x * silu(g)) @ w2.T + b2)
        rewards = drop(f) @ reward.T                         # drop: dropout

    Without w1 the pooler is ``tanh(hidden @ w2.T + b2)`` (bert, t5); without w1 and w2 it is the identity.

    Args:
        hidden: [R, C] states at each answer's end-of-turn token, fp16, bf16, fp32 or fp64. R may be 0.
        reward: [K, C] reward vectors, as all weights of hidden's dtype and device.
        w1: [2F, C], rows of [x | gate]; b1: [2F].
        w2: [C, F], or [C, C] without w1; b2: [C]. Both biases are optional.
        dropout: fraction of the pooled state's columns that is zeroed, in [0, 1); the others are scaled by
            1 / (1 - dropout).
        input_dropout: the same on hidden (the t5 poolers), drawn independently.
        seed: int64. The masks are Philox4x32-10 of (seed, row id, column): equal arguments give equal masks on every
            backend, and the backward pass draws them again.
        row_ids: [R] int64, the rows' identities for dropout, so that a row's mask does not depend on its batch.
            Default 0 .. R-1.
        backend: "auto" or a backend's name.

    Returns:
        [R, K] in fp32 (fp64 for fp64 inputs), in which all sums are taken.

    Under ``torch.autocast`` hidden and all weights are cast to its dtype; the sums stay in fp32.

    Raises:
        ValueError: a wrong shape, dtype, device, or dropout outside [0, 1).
    """
    inputs = hidden, reward, w1, b1, w2, b2 = checks.cast_together(hidden, reward, w1, b1, w2, b2)
    _check_weights(*inputs)
    if not (0.0 <= dropout < 1.0 and 0.0 <= input_dropout < 1.0 and -(2**63) <= seed < 2**63):  # usually no calls
        checks.number("dropout", dropout, 0.0, 1.0, below=True)
        checks.number("input_dropout", input_dropout, 0.0, 1.0, below=True)
        checks.number("seed", seed, -(2**63), 2**63 - 1)
    if row_ids is not None:
        checks.shape("row_ids", row_ids, hidden.shape[0])
        checks.dtype("row_ids", row_ids, torch.int64)
        checks.device("row_ids", row_ids, hidden.device)
    save = False
    if torch.is_grad_enabled():
        for x in inputs:
            save = save or (x is not None and x.requires_grad)
    rewards, *_ = OPERATOR(
        hidden=hidden,
        reward=reward,
        w1=w1,
        b1=b1,
        w2=w2,
        b2=b2,
        row_ids=row_ids,
        dropout=dropout,
        input_dropout=input_dropout,
        seed=seed,
        save=save,
        backend=backend,
    )
    return rewards
