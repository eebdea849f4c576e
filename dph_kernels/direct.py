"""An operator with gradients, and a way to it past PyTorch's dispatcher."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dph_kernels import dispatch


class Operator:
    """``dph::NAME`` and ``dph::NAME_backward`` of ``torch.library``; where nobody looks on, calls go past them.

    Their Python takes longer than the arithmetic of a small step, and a GPU waits for it. (``linear_logprob``,
    ``swiglu_reward`` and ``preference_loss`` are called once a part, and keep ways of their own.)

    Args:
        name: of the operator, and behind ``dph::`` of its calls in a profile.
        forward: inputs -> outputs, as ``torch.library.custom_op`` takes it.
        backward: what ``gradients`` calls, likewise.
        setup: (ctx, inputs, output), keeps what the gradients need.
        gradients: (ctx, \\*grads, backward) -> the inputs' gradients, by one of the two ways to ``backward``.

    Attributes:
        operator, backward_operator: the two of ``torch.library``.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., Any],
        backward: Callable[..., Any],
        setup: Callable[..., None],
        gradients: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:
        self.operator = torch.library.custom_op(f"dph::{name}", forward, mutates_args=())
        self.backward_operator = torch.library.custom_op(f"dph::{name}_backward", backward, mutates_args=())
        self.operator.register_autograd(partial(gradients, backward=self.backward_operator), setup_context=setup)
        self._name, self._forward, self._backward = f"dph::{name}", forward, backward

        def run(ctx: torch.autograd.function.FunctionCtx, *inputs: Any) -> Any:
            output = forward(*inputs)
            setup(ctx, inputs, output)  # by PyTorch's own way, setup_context, a call takes 50 us longer
            return output

        def back(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            # Where gradients are on, somebody wants gradients of gradients, which the operator refuses.
            alone = not torch.is_grad_enabled() and dispatch.unobserved(grad for grad in grads if grad is not None)
            return gradients(ctx, *grads, backward=backward if alone else self.backward_operator)

        functions = {"forward": staticmethod(run), "backward": staticmethod(back)}
        self._function = type(self._name, (torch.autograd.Function,), functions)

    def __call__(self, *inputs: Any) -> Any:
        """What ``forward`` gives, with gradients."""
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if not dispatch.unobserved(tensors):
            return self.operator(*inputs)
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return self._function.apply(*inputs)
        return self.forward(*inputs)

    def forward(self, *inputs: Any) -> Any:
        """What ``forward`` gives, past the dispatcher and without gradients: the caller knows that nobody looks on."""
        with dispatch.named(self._name):
            return self._forward(*inputs)

    def backward(self, *arguments: Any) -> Any:
        """What ``backward`` gives; the first tensors among its arguments are the gradients of the outputs."""
        if not dispatch.unobserved(x for x in arguments[:2] if isinstance(x, Tensor)):
            return self.backward_operator(*arguments)
        with dispatch.named(f"{self._name}_backward"):
            return self._backward(*arguments)
