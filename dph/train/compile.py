"""Compilation (``torch.compile``) of the parts of a block around attention.

    require(device)             # UserError if torch.compile does not work
    switch_on(model.backbone)
    switch_off(model.backbone)  # uncompiled again

``Block.before`` and ``Block.after`` become one graph each, shared by all blocks: norms, biases, SwiGLU and residuals
pass through memory once, matrix products stay the library's. Attention is left out: Python schedules its work from the
layout, and it writes the memory. Blocks, parameters, names and hooks (FSDP2's, checkpointing's) do not change.

CUDA graphs are not used. A replay overwrites the previous outputs, while the memory keeps rows of a call until the next
one, and every block would need a graph for each number of rows. The whole step cannot be recorded either: the number of
targets, the position in the memory and the rotation are numbers of the host that change in each step. With a frozen
backbone, the step of the heads can be recorded (``dph.train.cuda_graph``).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType

import torch
from torch import Tensor

from dph.errors import UserError, one_line
from dph.model.backbone import Backbone, Block

METHODS = ("before", "after")
# No timing decides between kernels with other rounding: a resumed run computes the same bits.
OPTIONS = {"deterministic": True}
LONG = 4096  # rows above which inductor's C++ sums in another order, in a graph of its own
FEW, MANY = 2048, 8192  # rows that the graphs are compiled with: for at most LONG rows, and for more


def require(device: torch.device) -> None:
    """Raise UserError with the reason if ``torch.compile`` does not work on ``device``."""
    try:
        torch.compile(_trivial, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no headers, no space for its files
        reason = one_line(error, 300)
        raise UserError(f"compile: expected a torch.compile that works on {device.type}, got: {reason}") from error


def _trivial(x: Tensor) -> Tensor:
    return x.sin() + 1


def switch_on(backbone: Backbone) -> None:
    """Run all blocks compiled; the graphs are compiled at the first use."""
    for name in METHODS:
        compiled = CompiledMethod(getattr(Block, name))
        for block in backbone.blocks:
            setattr(block, name, MethodType(compiled, block))


def switch_off(backbone: Backbone) -> None:
    """Run all blocks uncompiled again."""
    for block in backbone.blocks:
        for name in METHODS:
            vars(block).pop(name, None)


class CompiledMethod:
    """Method of all blocks, compiled for any number of rows.

    The number of rows is a dynamic size, not padded to ``batch.tokens``: pairs come in a few micro-batches per step, of
    which the last may be nearly empty, and the matrix products, which take most of the time, accept any size.

    Inductor chooses tiles and the order of sums by the rows that a graph is compiled with, and the last bits of results
    depend on them. So each graph is compiled with a fixed number of rows, at whichever step a run starts or resumes.
    """

    def __init__(self, method: Callable[..., Tensor]) -> None:
        # Graphs belong to code objects, which hold only a few each: a copy has its own, freed together with it.
        copied = FunctionType(method.__code__.replace(), method.__globals__, method.__name__)
        self._run = torch.compile(copied, fullgraph=True, options=dict(OPTIONS))
        self._compiled: set[tuple] = set()

    def __call__(self, block: Block, *rows: Tensor) -> Tensor:
        """Run the method of ``block`` on its rows [T, C]."""
        x, count = rows[0], _compiled_rows(len(rows[0]))
        state = torch.is_grad_enabled(), x.requires_grad, x.dtype, count
        if state not in self._compiled:
            self._compile(block, [x.new_zeros(count, x.shape[1]).requires_grad_(x.requires_grad) for x in rows])
            self._compiled.add(state)
        return self._run(block, *rows)

    def _compile(self, block: Block, rows: Sequence[Tensor]) -> None:
        """Compile the graph for rows of this kind; from two rows on, for any number."""
        for x in rows if len(rows[0]) > 1 else []:
            torch._dynamo.mark_dynamic(x, 0)
        # Activation checkpointing counts the saved tensors of a forward pass, which must not include this one's.
        with _without_gradients(block), torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged):
            self._run(block, *rows)


def _compiled_rows(count: int) -> int:
    """Return the rows that the graph for ``count`` rows is compiled with; PyTorch specialises 0 and 1."""
    if count < 2:
        return count
    return FEW if count <= LONG else MANY


@contextlib.contextmanager
def _without_gradients(block: Block) -> Iterator[None]:
    """Context without gradients: Dynamo compiles no graph of bf16 weights with accumulated fp32 gradients."""
    gradients = [(p, p.grad) for p in block.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in gradients:
            p.grad = grad


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor
