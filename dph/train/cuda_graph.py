"""CUDA graph of a training step: recorded once, and replayed with other inputs.

A small step spends its time in Python and in kernel launches; a replay is one launch. The graph records addresses and
numbers of the host, so everything that changes from step to step has to be in tensors: the inputs, of the same shapes
each time, the learning rate, LaProp's clock, the counts of the step guard. Nothing may wait for the device. The step of
stage head qualifies: states of the same number of answers each time. The steps of other stages have new shapes each
time (``dph.train.compile``).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dph.errors import UserError
from dph_kernels import dispatch

WARMUP_CALLS = 3  # before recording: libraries initialise themselves, and kernels are compiled


def require(device: torch.device, processes: int) -> None:
    """Raise UserError if a step cannot be recorded: with several processes, or if LaProp would wait for the device."""
    if device.type != "cuda" or processes > 1:
        raise UserError(f"cuda_graph: expected one process on a GPU, got {processes} on {device.type}")
    if reason := dispatch.missing("laprop", "cuda", device.type):
        raise UserError(f"cuda_graph: expected the CUDA kernels of laprop, got none: {reason}")


class GraphRecorder:
    """CUDA graph and the stream that it is recorded on."""

    def __init__(self, device: torch.device) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        """Context on the recording's stream: autograd keeps objects of a stream from one step to the next."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self) -> contextlib.AbstractContextManager[None]:
        """Context that records kernel launches without running them.

        Calls of other threads (a tracker's, for example) do not interfere.
        """
        return torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local")

    def replay(self) -> None:
        """Run the recorded launches."""
        self._graph.replay()


class GraphedFunction:
    """Function that runs normally for ``WARMUP_CALLS`` calls, and is then recorded and replayed.

    Args:
        function: takes a named tuple, whose fields are tensors or None, and returns any nesting of tensors.
        recorder: of the graph.
    """

    def __init__(self, function: Callable[[Any], Any], recorder: GraphRecorder) -> None:
        self._function, self._recorder = function, recorder
        self._calls = 0
        self._inputs: Any = None  # tensors that the graph reads
        self._outputs: Any = None

    def __call__(self, inputs: Any) -> Any:
        """Return the outputs; once recorded, their tensors are overwritten by the next call.

        Raises ValueError for inputs of other shapes or types than the recorded ones.
        """
        self._calls += 1
        if self._calls <= WARMUP_CALLS:
            with self._recorder.side_stream():
                return self._function(inputs)
        if self._calls == WARMUP_CALLS + 1:
            self._inputs = type(inputs)._make(None if x is None else x.clone() for x in inputs)
            with self._recorder.record():
                self._outputs = self._function(self._inputs)
        for name, recorded, new in zip(inputs._fields, self._inputs, inputs, strict=True):
            if _kind(new) != _kind(recorded):
                raise ValueError(f"{name}: expected {_kind(recorded)} as it was recorded, got {_kind(new)}")
            if recorded is not None:
                recorded.copy_(new)
        self._recorder.replay()
        return self._outputs


def _kind(tensor: Tensor | None) -> tuple | None:
    return None if tensor is None else (list(tensor.shape), tensor.dtype)
