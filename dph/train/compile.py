"""What the blocks compute around attention, compiled by PyTorch (``torch.compile``).

    require(device)             # UserError where that does not work
    switch_on(model.backbone)
    switch_off(model.backbone)  # plain again

``Block.before`` and ``Block.after`` become a graph each, which all blocks share: norms, biases, SwiGLU and residuals go
through memory once, the products stay the library's. Attention is left out: its work is scheduled in Python, from the
layout, and it keeps the memory. Blocks, parameters and their names, and hooks (FSDP2's, checkpointing's) stay as they
are.

No CUDA graphs. A replay overwrites what the last one gave, while the memory holds rows of a call until the next, and
every block would be a recording of its own for each number of rows. Nor can the whole step be recorded: how many
targets it has, where memory is written and which positions are rotated by are numbers of the host, new in each step.
Where the backbone stands still, the step of the heads can (``dph.train.cuda_graph``).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, MethodType

import torch
from torch import Tensor

from dph.errors import UserError
from dph.model.backbone import Backbone, Block

METHODS = ("before", "after")
# Nothing that changes results is decided by a stopwatch: a run that resumes computes the same bits.
OPTIONS = {"deterministic": True}
LONG = 4096  # rows above which inductor's C++ adds up otherwise, by another graph
FEW, MANY = 2048, 8192  # rows that the graphs are made with: up to LONG, and above


def require(device: torch.device) -> None:
    """UserError with the reason where ``torch.compile`` does not work on ``device``."""
    try:
        torch.compile(_trivial, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # whatever keeps it from working: no compiler, no headers, no room for its files
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"compile: expected a torch.compile that works on {device.type}, got: {reason}") from error


def _trivial(x: Tensor) -> Tensor:
    return x.sin() + 1


def switch_on(backbone: Backbone) -> None:
    """Let all blocks run compiled; the graphs are made when they are first needed."""
    for name in METHODS:
        shared = Shared(getattr(Block, name))
        for block in backbone.blocks:
            setattr(block, name, MethodType(shared, block))


def switch_off(backbone: Backbone) -> None:
    """Let all blocks run plain again."""
    for block in backbone.blocks:
        for name in METHODS:
            vars(block).pop(name, None)


class Shared:
    """A method of blocks, compiled for any number of rows.

    Rows are a dynamic size, not padded to ``batch.tokens``: pairs come as a few parts an update, of which the last may
    be nearly empty; the products, where the time goes, are the library's and take any size.

    What inductor makes of a graph (tiles, how sums over rows are split) may depend on the rows that it sees first, and
    the last bits of results with it. So each graph is made with a fixed number of them, wherever a run begins or
    resumes.
    """

    def __init__(self, method: Callable[..., Tensor]) -> None:
        # Graphs hang on code objects, a few on each at most: a copy has its own, and they go with it.
        own = FunctionType(method.__code__.replace(), method.__globals__, method.__name__)
        self._run = torch.compile(own, fullgraph=True, options=dict(OPTIONS))
        self._made: set[tuple] = set()

    def __call__(self, block: Block, *rows: Tensor) -> Tensor:
        """The method of ``block`` on its rows [T, C]."""
        x, count = rows[0], _made_with(len(rows[0]))
        state = torch.is_grad_enabled(), x.requires_grad, x.dtype, count
        if state not in self._made:
            self._make(block, [x.new_zeros(count, x.shape[1]).requires_grad_(x.requires_grad) for x in rows])
            self._made.add(state)
        return self._run(block, *rows)

    def _make(self, block: Block, rows: Sequence[Tensor]) -> None:
        """The graph for rows like these; of two or more, for any number."""
        for x in rows if len(rows[0]) > 1 else []:
            torch._dynamo.mark_dynamic(x, 0)
        # Checkpointing counts what a forward pass keeps, and nothing of this one belongs to it.
        with _gradients_aside(block), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            self._run(block, *rows)


def _made_with(count: int) -> int:
    """Rows that the graph for ``count`` of them is made with; PyTorch has graphs of their own for 0 and 1."""
    return count if count < 2 else FEW if count <= LONG else MANY


@contextlib.contextmanager
def _gradients_aside(block: Block) -> Iterator[None]:
    """Dynamo makes no graph of bf16 weights that have gathered an fp32 gradient."""
    gradients = [(p, p.grad) for p in block.parameters()]
    for p, _ in gradients:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in gradients:
            p.grad = grad


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
