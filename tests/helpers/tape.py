"""A recording as a CUDA graph makes it, of what PyTorch's operators do on the CPU."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What makes a GPU wait: operators whose results have a size that it has to tell, and those that give it numbers or take
# them out of the host's own memory.
WAITS = ("_local_scalar_dense", "equal", "lift_fresh", "masked_select", "nonzero", "repeat_interleave", "_unique2")
METHODS = ("cpu", "numpy", "pin_memory", "tolist")


class Tape(TorchDispatchMode):
    """What ``dph.train.cuda_graph.GraphRecorder`` does, where there is no GPU.

    Operators are noted with the tensors and the numbers that they were called with, and called again with the same ones
    at each replay, whose results go where the first ones lie. To record is to run, so the first replay does nothing.
    What would make a GPU wait is refused, as far as it is PyTorch's: nobody looks into operators of our own.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.replays, self.side_streams = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = function._schema.name in ("aten::index", "aten::index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if by_mask or function._schema.name.removeprefix("aten::") in WAITS:
            raise AssertionError(f"{function} waits for the device")
        results = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, results))
        return results

    @contextlib.contextmanager
    def side_stream(self):
        self.side_streams += 1
        yield

    @contextlib.contextmanager
    def record(self):
        def refuse(*args, **kwargs):
            raise AssertionError("a copy to the host waits for the device")

        assert not self.calls
        with pytest.MonkeyPatch.context() as patch, self:
            for name in METHODS:
                patch.setattr(torch.Tensor, name, refuse)
            yield

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.calls if self.replays > 1 else []:
            for kept, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)
