"""A step that the GPU goes through by itself: recorded once as a CUDA graph, and replayed with other numbers.

A small step spends its time in Python and in the launches of its kernels; a replay is one launch. What is recorded are
addresses and the host's numbers, so all that changes from step to step has to lie in tensors: what the step is given,
of the same shapes each time, the learning rate, LaProp's clock, the guard's counts. Nothing in it may wait for the
device. The step of stage head is one: states of as many answers each time. Those of the other stages have new shapes
each time (``dph.train.compile``).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dph.errors import UserError
from dph_kernels import dispatch

WARM = 3  # calls before the recording: libraries set themselves up, and kernels are compiled


def require(device: torch.device, processes: int) -> None:
    """UserError where a step cannot be recorded: of several processes, or where LaProp would ask the device."""
    if device.type != "cuda" or processes > 1:
        raise UserError(f"cuda_graph: expected one process on a GPU, got {processes} on {device.type}")
    if reason := dispatch.missing("laprop", "cuda", device.type):
        raise UserError(f"cuda_graph: expected the CUDA kernels of laprop, got none: {reason}")


class Recording:
    """A CUDA graph, and the stream that it is made on."""

    def __init__(self, device: torch.device) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run the block on that stream: what autograd keeps of a stream from one step to the next has to be of it."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self) -> contextlib.AbstractContextManager[None]:
        """Record what the block launches; nothing of it runs.

        What other threads ask the GPU for meanwhile (a tracker's, say) has nothing to do with it.
        """
        return torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local")

    def replay(self) -> None:
        """Run what was recorded."""
        self._graph.replay()


class Captured:
    """A function that is called as it is, ``WARM`` times, and then recorded and replayed.

    Args:
        run: takes a named tuple, whose fields are tensors or None, and gives anything.
        recording: that it goes into.
    """

    def __init__(self, run: Callable[[Any], Any], recording: Recording) -> None:
        self._run, self._recording = run, recording
        self._calls = 0
        self._given: Any = None
        self._outputs: Any = None

    def __call__(self, given: Any) -> Any:
        """What ``run`` gives; once it is recorded, its tensors are overwritten by the next call.

        ValueError where ``given`` is not like what was recorded.
        """
        self._calls += 1
        if self._calls <= WARM:
            with self._recording.aside():
                return self._run(given)
        if self._calls == WARM + 1:
            self._given = type(given)._make(None if x is None else x.clone() for x in given)
            with self._recording.record():
                self._outputs = self._run(self._given)
        for name, kept, new in zip(given._fields, self._given, given, strict=True):
            if _kind(new) != _kind(kept):
                raise ValueError(f"{name}: expected {_kind(kept)} as it was recorded, got {_kind(new)}")
            if kept is not None:
                kept.copy_(new)
        self._recording.replay()
        return self._outputs


def _kind(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (list(tensor.shape), tensor.dtype)
