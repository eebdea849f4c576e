"""The definition of an operator: registration with PyTorch, gradients, and calls that bypass the dispatcher.

The Python of PyTorch's dispatcher and of its custom operators takes longer than the arithmetic of a small step, and a
GPU waits for it. A call bypasses both when no tracing, mode or transform is active and all tensors are plain.

The rules for other tensors are the same for all operators. Subclasses and lazily negated tensors go through the
dispatcher; a subclass that the dispatcher leaves as it is, is computed as a plain tensor. Implicit zeros are written
out. A tensor whose storage was freed, or is too small, and a sparse one raise ValueError.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from dph_kernels import checks, dispatch
from dph_kernels.torch_private import constant, forward_mode_level, is_differentiated, is_zerotensor, unwrapped_apply

Inputs = dict[str, Any]
"""Values by the names of an operator's signature, without ``backend``."""

_requires_grad = attrgetter("requires_grad")


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """The backward pass of an operator.

    Attributes:
        setup: ``(ctx, output, inputs)``, stores on ``ctx`` what ``compute`` reads.
        compute: ``(ctx, needs, backward, *grads) -> {input: gradient}``, empty if there are none; a tensor that needs
            none may be left out. ``needs`` maps each tensor (not lists) to whether its gradient is needed.
            ``backward`` is called by keyword: an implementation's ``backward``, the operator of ``fake``, or ``plain``.
        fake: the signature of the operator ``dph::NAME_backward``; returns empty results of the right shapes.
        plain: in place of ``fake``, the backward pass in PyTorch's own operations, which the dispatcher sees.
        like: the argument of ``backward`` whose device and dtype decide which implementation runs.
        upstream: the arguments of ``backward`` that are gradients of outputs.
        differentiable: the number of outputs that have a gradient, the first ones.
        constants: the tensors that have no gradient although they could.
    """

    setup: Callable[..., None]
    compute: Callable[..., Inputs]
    fake: Callable[..., Any] | None = None
    plain: Callable[..., Any] | None = None
    like: str
    upstream: tuple[str, ...] = ("grad",)
    differentiable: int = 1
    constants: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JointGradient:
    """Gradients that an implementation's ``forward_and_gradients`` computes along with the outputs.

    Attributes:
        pays: ``(implementation, inputs) -> bool``, whether a call that bypasses the dispatcher computes them.
            ``forward_and_gradients`` and ``setup`` get the call's ``joint`` arguments among the inputs, too.
        setup: ``(ctx, results, inputs) -> outputs``, stores on ``ctx`` what ``compute`` reads.
        compute: as in :class:`Gradient`, whose own is called if the gradients are to be differentiated.
    """

    pays: Callable[[ModuleType, Inputs], bool]
    setup: Callable[..., Any]
    compute: Callable[..., Inputs]


class Operator:
    """``dph::NAME`` of ``torch.library`` with its gradient, and the same computation without the dispatcher.

    All calls are by keyword. The implementation is a function of a backend's module in the operator's folder, which
    takes the operator's arguments except ``backend``.

    Args:
        name: the name in ``torch.ops.dph``, and behind ``dph::`` in a profile.
        fake: the operator's signature, of which ``backend: str`` is the last argument; returns empty results of the
            right shapes.
        like: ``(inputs) -> tensor`` whose device and dtype decide which implementation runs.
        folder: the operator's folder, if it is not ``name``.
        function: the implementation's name in a backend's module.
        mutates: the arguments that are written to.
        gradient: the backward pass, if there is one.
        joint: gradients along with the forward pass, for calls that permit them.
        accept: ``(inputs) -> bool``, raises ValueError for tensors that do not fit, and returns whether all of them are
            plain and in memory, and nothing is compiled: for an operator that finds this out faster than the default.
            Called first of all.
        check: ``(inputs)``, raises ValueError for values that do not fit. Called just before an implementation.

    Attributes:
        name: the name in a profile, with ``dph::``.
        operator: the operator of ``torch.library``.
        backward_operator: the operator of the backward pass, or ``plain``.
    """

    def __init__(
        self,
        name: str,
        *,
        fake: Callable[..., Any],
        like: Callable[[Inputs], Tensor],
        folder: str | None = None,
        function: str = "forward",
        mutates: Sequence[str] = (),
        gradient: Gradient | None = None,
        joint: JointGradient | None = None,
        accept: Callable[[Inputs], bool] | None = None,
        check: Callable[[Inputs], None] | None = None,
    ) -> None:
        self.name = f"dph::{name}"
        self._folder, self._function, self._like = folder or name, function, like
        self._mutates, self._accept, self._check = tuple(mutates), accept, check
        self._gradient, self._joint = gradient, joint
        types = get_type_hints(fake)
        del types["return"], types["backend"]
        self._parameters = tuple(types)
        self._tensors = tuple(name for name, kind in types.items() if kind in (Tensor, Tensor | None))
        self._lists = tuple(name for name, kind in types.items() if kind == list[Tensor])
        self.operator = _register(self.name, self._kernel, fake, self._mutates)
        if gradient:
            self._register_gradient(gradient)
            self._apply = self._autograd_function(function, gradient.setup, gradient.compute)
        if joint:
            function = "forward_and_gradients"
            self._apply_joint = self._autograd_function(function, joint.setup, joint.compute)

    def __call__(self, *, backend: str, joint: Inputs | None = None, **inputs: Any) -> Any:
        """Return the outputs, with gradients.

        ``joint``: more arguments of ``forward_and_gradients`` if it may compute them along with the outputs, else None.
        """
        plain = self._accept(inputs) if self._accept else None
        values = list(map(inputs.get, self._tensors))
        for name in self._lists:
            values += inputs[name]
        if plain is None:
            bypass = dispatch.can_bypass_dispatcher(values)
        else:
            bypass = plain and not dispatch.is_intercepted(values)
        if not bypass:
            return self._dispatched(inputs, backend, list(filter(checks.is_given, values)))
        if not (
            self._gradient and torch.is_grad_enabled() and any(map(_requires_grad, filter(checks.is_given, values)))
        ):
            return self._forward(inputs, backend)
        if joint is not None and self._joint.pays(self._choose(inputs, backend)[0], inputs):
            return self._apply_joint(inputs | joint, backend, *values)
        return self._apply(inputs, backend, *values)

    def _dispatched(self, inputs: Inputs, backend: str, tensors: Sequence[Tensor]) -> Any:
        """Return the outputs through the dispatcher, or if derivatives are needed by the reference."""
        if dispatch.needs_formula(tensors):
            if self._gradient:
                return self._differentiable(inputs, backend)
            if forward_mode_level() >= 0:
                raise RuntimeError(f"{self.name}: expected tensors without tangents, as it has no derivative")
        for name in self._lists:
            if name not in self._mutates:
                inputs[name] = list(map(_written_out, inputs[name]))
        return self.operator(**inputs, backend=backend)

    def forward(self, *, backend: str, **inputs: Any) -> Any:
        """Return the outputs without gradients, bypassing the dispatcher; the caller has checked that this is possible.

        As with the dispatcher, the versions of tensors that are written to are incremented.
        """
        return self._forward(inputs, backend)

    def backward(self, *, backend: str, **arguments: Any) -> Any:
        """Return the results of ``backward``, through the dispatcher if the upstream gradients need it.

        So it is with gradients enabled: gradients of gradients are wanted, which the operator refuses.
        """
        if torch.is_grad_enabled() or not dispatch.can_bypass_dispatcher(
            list(map(arguments.get, self._gradient.upstream))
        ):
            return self._dispatched_backward(**arguments, backend=backend)
        with dispatch.profile_range(f"{self.name}_backward"):
            return self._run_backward(**arguments, backend=backend)

    # Implementations

    def _choose(self, inputs: Inputs, backend: str) -> tuple[ModuleType, str]:
        """Return the module that implements the operator, and the type of the inputs' device."""
        like = self._like(inputs)
        device = like.device.type
        return dispatch.implementation(self._folder, device, backend, like.dtype), device

    def _run(self, inputs: Inputs, backend: str) -> Any:
        implementation, device = self._choose(inputs, backend)
        if self._check:
            self._check(inputs)
        return dispatch.call(getattr(implementation, self._function), device, inputs)

    def _run_backward(self, *, backend: str, **arguments: Any) -> Any:
        like = arguments[self._gradient.like]
        device = like.device.type
        implementation = dispatch.implementation(self._folder, device, backend, like.dtype)
        return dispatch.call(implementation.backward, device, arguments)

    def _forward(self, inputs: Inputs, backend: str) -> Any:
        if self._mutates:
            written = []
            for value in map(inputs.get, self._mutates):
                if isinstance(value, Tensor):
                    written.append(value)
                elif value is not None:
                    written += value
            torch.autograd.graph.increment_version(written)
        with dispatch.profile_range(self.name):
            return self._run(inputs, backend)

    def _kernel(self, *, backend: str, **inputs: Any) -> Any:
        """Run the operator, called by the dispatcher."""
        inputs = _readable(inputs)
        if self._accept:
            self._accept(inputs)
        return self._run(inputs, backend)

    def _backward_kernel(self, *, backend: str, **arguments: Any) -> Any:
        """Run the backward pass, called by the dispatcher."""
        return self._run_backward(**_readable(arguments), backend=backend)

    def _differentiable(self, inputs: Inputs, backend: str) -> Any:
        """Return the outputs by the reference, in PyTorch's own operations, which have derivatives of every kind."""
        if backend not in ("auto", "reference"):
            self._choose(inputs, backend)  # raises for an unknown backend, or one that cannot run at all
            raise RuntimeError(
                f"{self._folder}: backend {backend!r} cannot run: torch.func and forward-mode differentiation need "
                "PyTorch's own operations; use 'auto' or 'reference'"
            )
        inputs = dict(inputs)
        for name, value in inputs.items():
            _check_memory(name, value)
            if name in self._gradient.constants:
                inputs[name] = constant(value)
        implementation, device = self._choose(inputs, "reference")
        outputs = dispatch.call(getattr(implementation, self._function), device, inputs)
        if isinstance(outputs, Tensor):
            return outputs
        count = self._gradient.differentiable
        return *outputs[:count], *map(constant, outputs[count:])

    # Gradients

    def _dispatched_backward(self, *, backend: str, **arguments: Any) -> Any:
        """Return the results of ``backward`` by the dispatcher; refuse upstream gradients that are differentiated."""
        for name in self._gradient.upstream:
            grad = arguments[name]
            if grad is None:
                continue
            checks.memory(name, grad)
            if self._gradient.fake and dispatch.needs_formula([grad]):
                raise RuntimeError(
                    f"{name} of {self.name}_backward: expected a gradient that nothing differentiates; call the "
                    "operator itself inside of torch.func or forward-mode differentiation"
                )
        return self.backward_operator(**arguments, backend=backend)

    def _register_gradient(self, gradient: Gradient) -> None:
        """Register the backward pass with the dispatcher."""
        if gradient.fake:
            self.backward_operator = _register(f"{self.name}_backward", self._backward_kernel, gradient.fake)
        else:
            self.backward_operator = lambda *, backend, **arguments: gradient.plain(**arguments)

        def setup(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
            *inputs, ctx.backend = inputs
            gradient.setup(ctx, output, dict(zip(self._parameters, inputs, strict=True)))

        def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Any, ...]:
            needs = dict(zip(self._parameters, ctx.needs_input_grad, strict=False))
            nothing = {name: [None] * len(needs[name]) for name in self._lists}
            computed = gradient.compute(ctx, needs, partial(self._dispatched_backward, backend=ctx.backend), *grads)
            return *map((nothing | computed).get, self._parameters), None

        self.operator.register_autograd(backward, setup_context=setup)

    def _autograd_function(
        self, function: str, setup: Callable[..., Any], compute: Callable[..., Inputs]
    ) -> Callable[..., Any]:
        """Return ``apply`` of an autograd function that calls ``function`` of the implementation, past the dispatcher.

        Gradients that are to be differentiated are those of ``Gradient``, which have a graph.
        """

        def forward(ctx: FunctionCtx, inputs: Inputs, backend: str, *tensors: Tensor | None) -> Any:
            implementation, device = self._choose(inputs, backend)
            if self._check:
                self._check(inputs)
            output = dispatch.call(getattr(implementation, function), device, inputs)
            ctx.call = implementation.backward, device, backend
            # Called here, as PyTorch's own setup_context costs 50 us a call.
            outputs = setup(ctx, output, inputs)
            return output if outputs is None else outputs

        def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Any, ...]:
            backward, device, backend = ctx.call
            # With gradients enabled, gradients of gradients are wanted, which the operator refuses.
            wanted = torch.is_grad_enabled()
            if wanted or not dispatch.can_bypass_dispatcher(grads):
                backward = partial(self._dispatched_backward, backend=backend)
            elif torch.is_autocast_enabled(device):
                backward = partial(dispatch.without_autocast, backward, device)
            needs = ctx.needs_input_grad
            run = self._gradient.compute if wanted else compute
            computed = run(ctx, dict(zip(self._tensors, needs[2:], strict=False)), backward, *grads)
            if not computed:
                return (None,) * len(needs)
            results = [None, None, *map(computed.get, self._tensors)]
            for name in self._lists:
                results += computed[name]
            return tuple(results)

        functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return unwrapped_apply(type(self.name, (torch.autograd.Function,), functions))


def _readable(arguments: Inputs) -> Inputs:
    """Return the arguments with instances of subclasses as plain tensors.

    Raises ValueError for tensors without memory, and RuntimeError for those with a tangent, which would be lost: a call
    of ``torch.ops.dph``, or of a function that was compiled outside of forward-mode differentiation.
    """
    readable = {}
    for name, value in arguments.items():
        if isinstance(value, (list, tuple)):
            value = list(map(_plain, value))
        readable[name] = _plain(value)
        _check_memory(name, readable[name])
        if isinstance(value, Tensor) and is_differentiated(value):
            raise RuntimeError(
                f"{name}: expected a tensor without a tangent, as kernels have no forward-mode derivative"
            )
    return readable


def _written_out(x: Tensor) -> Tensor:
    """Return a tensor of a list with memory if it is an implicit zero: the dispatcher would expand a single zero."""
    compiling = torch.compiler.is_dynamo_compiling()
    return x.clone() if not compiling and type(x) in checks.PLAIN and is_zerotensor(x) else x


def _plain(value: Any) -> Any:
    is_subclass = isinstance(value, Tensor) and type(value) not in checks.PLAIN
    return value.as_subclass(Tensor) if is_subclass else value


def _check_memory(name: str, value: Any) -> None:
    """Require memory of a tensor or of each tensor in a list."""
    if isinstance(value, Tensor):
        checks.memory(name, value)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check_memory(f"{name}[{i}]", item)


def _register(
    name: str, run: Callable[..., Any], fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> torch.library.CustomOpDef:
    """Define an operator of the signature of ``fake``, which calls ``run`` by keyword."""
    parameters = tuple(inspect.signature(fake).parameters)

    def kernel(*values: Any) -> Any:
        return run(**dict(zip(parameters, values, strict=True)))

    schema = torch.library.infer_schema(fake, mutates_args=mutates)
    defined = torch.library.custom_op(name, kernel, mutates_args=mutates, schema=schema)
    defined.register_fake(fake)
    return defined
