"""A recording as a CUDA graph makes it, of what PyTorch's operators do on the CPU."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.is_nonzero.default")


class Tape(TorchDispatchMode):
    """What ``dph.captured.Recording`` does, where there is no GPU.

    Operators are noted with the tensors and the numbers that they were called with, and called again with the same ones
    at each replay, whose results go where the first ones lie. To record is to run, so the first replay does nothing.
    What would make a GPU wait is refused.
    """

    def __init__(self, device=None):
        super().__init__()
        self.calls, self.replays, self.asides = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert str(function) not in WAITS, f"{function} waits for the device"
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    @contextlib.contextmanager
    def aside(self):
        self.asides += 1
        yield

    def record(self):
        assert not self.calls
        return self

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls if self.replays > 1 else []:
            for kept, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)
