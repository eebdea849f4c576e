"""Worker processes that read and encode records ahead of training, which receives them in the sampler's order.

    pool = WorkerPool(mixture(datasets, seed=0), tokenizer, workers=2)     # a Sampler of encoded records
    next(pool)
    pool.close()

The main process draws the indices; worker i of n reads and encodes every n-th record. The state is that of the records
received: prefetched records are read again by the run that continues from it, with any number of workers.

A worker is a fresh interpreter that imports this module, not the script that started the run: multiprocessing would run
the script again, and a fork would copy the locks of PyTorch's threads.
"""

import contextlib
import copyreg
import ctypes
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fcntl import F_DUPFD_CLOEXEC, fcntl
from multiprocessing import spawn
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from types import FunctionType
from typing import Any, NamedTuple

from dph.data.formats import Encoder
from dph.data.sampler import IndexSampler, RecordIndex, read
from dph.errors import UserError

MAX_PREFETCHED = 1024  # records, over all workers: those of one or two steps
MAX_PREFETCHED_BYTES = 64 << 20  # of these records in the workers; a token takes 8
PATIENCE = 60  # seconds without a record after which a note is logged
PARENT_CHECK = 0.5  # seconds between a worker's checks of its parent process
PR_SET_PDEATHSIG = 1  # of Linux's prctl

# Terminals and batch systems send these to the whole process group: handled by the main process, blocked in workers.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """Exception of a worker, sent in place of a record: whether it is a UserError, its message, its traceback."""

    is_user_error: bool
    message: str
    traceback: str


class Pickler(ForkingPickler):
    """Pickler for another process that refuses classes and functions of the script that is run, by their names."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # Tensors by value: PyTorch's reductions for multiprocessing send a handle that one process can take, once.
        self.dispatch_table = copyreg.dispatch_table

    def reducer_override(self, value: Any) -> Any:
        """Raise UserError if the script defines ``value``; leave all else to the default."""
        if isinstance(value, type | FunctionType) and value.__module__ in ("__main__", "__mp_main__"):
            raise UserError(
                f"data.workers: expected records and a tokenizer of modules, got {value.__qualname__!r} of the script "
                "or notebook itself, which workers do not run; move it to a module, or set data.workers=0"
            )
        return NotImplemented


@dataclass(frozen=True)
class Worker:
    """A process and the main process's ends of its two pipes; only the worker holds the other ends."""

    number: int
    process: subprocess.Popen
    indices: Connection
    records: Connection
    readable: select.poll  # of ``records``

    def __str__(self) -> str:
        """Name in messages."""
        return f"worker {self.number} (process {self.process.pid})"


class WorkerPool:
    """Encoded records of ``sampler`` in its order. The processes start with the first record.

    Args:
        sampler: used by this object alone from now on.
        tokenizer: the encoder's tokenizer.
        workers: number of processes, at least 1. They block the signals that the main process handles, and end with
            it in every case.
        loss: of the encoder; None: records are read, but not encoded.

    Raises UserError if records or tokenizer cannot be pickled, and in a frozen program, which has no interpreter. The
    script that is run is not imported in the workers: it needs no ``if __name__ == "__main__":``, but records of
    classes that it defines itself cannot be sent.
    """

    def __init__(self, sampler: IndexSampler, tokenizer: Any, workers: int, loss: str | None = "answers") -> None:
        self.sampler, self.run, self._count = sampler, sampler.run, workers
        if getattr(sys, "frozen", False) or not spawn.get_executable():
            raise UserError("data.workers: expected 0 in a program without a Python interpreter of its own")
        try:
            self._initial_message = bytes(Pickler.dumps((sampler.datasets, tokenizer, loss)))
        except UserError:
            raise
        except Exception as error:  # objects that cannot be pickled raise any kind of exception
            raise UserError(
                "data.workers: expected records and a tokenizer that can be sent to another process, got "
                f"{type(error).__name__}: {error}; data.workers=0 reads them in this one"
            ) from error
        self._workers: list[Worker] = []
        self._prefetched: deque[RecordIndex] = deque()  # sent to the workers, not yet received
        self._next_worker = 0  # which reads the first of these
        self._received = self._received_bytes = 0
        self.close = weakref.finalize(self, _stop, self._workers)  # at the interpreter's exit as well

    @property
    def size(self) -> int:
        """Records in one pass."""
        return self.sampler.size

    @property
    def position(self) -> int:
        """Records received so far."""
        return self.sampler.position - len(self._prefetched)

    def __iter__(self) -> Iterator[Any]:
        """Return the pool itself."""
        return self

    def __next__(self) -> Any:
        """Return the next record, encoded; None is a pair without a wrong answer.

        Raises UserError or RuntimeError if reading or encoding it failed, UserError if its worker has ended.
        """
        if not self._workers:
            self._start()
        self._prefetch()
        if not self._prefetched:
            raise StopIteration
        record = self._receive()
        if isinstance(record, Failure):
            kind = UserError if record.is_user_error else RuntimeError
            raise kind(record.message) from RuntimeError(record.traceback)
        return record

    def state_dict(self, position: int | None = None) -> dict[str, Any]:
        """Return the sampler's state after the records received, or after the first ``position`` of them."""
        return self.sampler.state_dict(self.position if position is None else position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; prefetched records are dropped."""
        while self._prefetched:
            self._receive()
        self.sampler.load_state_dict(state)

    def _start(self) -> None:
        """Start the workers with signals blocked from their first instruction, and send them records and tokenizer."""
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for number in range(self._count):
                self._workers.append(_start_worker(number))
        except OSError as error:  # too many processes or open files
            started = len(self._workers)
            self.close()
            raise UserError(f"data.workers: expected {self._count} processes, got {started}: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):  # reported when a record of the worker is received
                worker.indices.send_bytes(self._initial_message)
        self._initial_message = b""

    def _prefetch(self) -> None:
        """Send indices to the workers in turn, up to the limits, given the mean size of the records so far."""
        limit = 2 * self._count
        if self._received_bytes:
            limit = max(limit, MAX_PREFETCHED_BYTES * self._received // self._received_bytes)
        while len(self._prefetched) < min(MAX_PREFETCHED, limit):
            try:
                index = self.sampler.next_index()
            except StopIteration:
                return
            worker = self._workers[(self._next_worker + len(self._prefetched)) % self._count]
            with contextlib.suppress(BrokenPipeError):
                worker.indices.send(index)
            self._prefetched.append(index)

    def _receive(self) -> Any:
        """Return the first of the prefetched records, or the failure of its worker."""
        worker = self._workers[self._next_worker]
        waited = 0
        while not worker.readable.poll(1000):
            waited += 1
            for other in self._workers:
                if other.process.poll() is not None:
                    raise UserError(_obituary(other))
            if waited % PATIENCE == 0:
                log.warning("data.workers: no record from %s for %d s; it hangs or is stopped", worker, waited)
        try:
            message = worker.records.recv_bytes()
        except (EOFError, ConnectionResetError):
            raise UserError(_obituary(worker)) from None
        self._prefetched.popleft()
        self._next_worker = (self._next_worker + 1) % self._count
        self._received += 1
        self._received_bytes += len(message)
        return ForkingPickler.loads(message)


def _start_worker(number: int) -> Worker:
    """Start one process. Its pipe (64 KB) has room for the indices of all prefetched records: sending never blocks."""
    worker_indices, indices = _pipe()
    records, worker_records = _pipe()
    descriptors = (worker_indices.fileno(), worker_records.fileno())
    in_main_thread = threading.current_thread() is threading.main_thread()
    paths = [path for path in sys.path if isinstance(path, str)]
    code = (
        f"import sys; sys.path[:] = {paths!a}; "  # before the first import that is not built in
        f"from {__name__} import run_worker; run_worker(*{descriptors}, {in_main_thread})"
    )
    flags = subprocess._args_from_interpreter_flags()  # such as -X utf8, as multiprocessing passes them
    process = subprocess.Popen([spawn.get_executable(), *flags, "-c", code], pass_fds=descriptors)
    worker_indices.close()
    worker_records.close()
    readable = select.poll()
    readable.register(records, select.POLLIN)
    return Worker(number, process, indices, records, readable)


def _pipe() -> tuple[Connection, Connection]:
    """Return the reading and the writing end of a pipe.

    Their descriptors are never those of a standard stream, which may be closed: the worker would print into the pipe.
    """
    ends = []
    for descriptor in os.pipe():
        ends.append(fcntl(descriptor, F_DUPFD_CLOEXEC, 3))
        os.close(descriptor)
    return Connection(ends[0], writable=False), Connection(ends[1], readable=False)


def _obituary(worker: Worker) -> str:
    """Return in words how a process ended that should not have."""
    try:
        code = worker.process.wait(10)
    except subprocess.TimeoutExpired:
        return f"data.workers: {worker} closed its pipe without ending"
    if code >= 0:
        return f"data.workers: {worker} ended with exit code {code}"
    names = {number.value: number.name for number in signal.Signals}
    name = names.get(-code, f"signal {-code}")
    hint = "; the kernel does so when memory runs out" if name == "SIGKILL" else ""
    return f"data.workers: {worker} was killed by {name}{hint}"


def _stop(workers: list[Worker]) -> None:
    """Kill the processes: they hold nothing that has to be saved."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.wait()
        worker.indices.close()
        worker.records.close()
    workers.clear()


# In the worker


def run_worker(indices_descriptor: int, records_descriptor: int, parent_thread_stays: bool) -> None:
    """Read and encode records until a pipe breaks, which happens when the main process closes its ends or dies."""
    _end_with_parent(parent_thread_stays)
    indices = Connection(indices_descriptor, writable=False)
    records = Connection(records_descriptor, readable=False)
    with contextlib.suppress(EOFError, BrokenPipeError):
        _read_and_encode(indices, records)
    os._exit(0)  # silently: nothing of the interpreter's end may print


def _end_with_parent(parent_thread_stays: bool) -> None:
    """End this process soon after its parent, also when all of its threads are busy or blocked.

    Linux kills it even if it is stopped or hangs in C++. But "parent" means the thread that started the worker, so this
    is used only for the main thread.
    """
    if sys.platform == "linux" and parent_thread_stays:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def _read_and_encode(indices: Connection, records: Connection) -> None:
    """Send the encoded records of the indices received, or failures in their place."""
    try:
        datasets, tokenizer, loss = indices.recv()
        encode = Encoder(tokenizer, loss) if loss is not None else lambda record: record
    except EOFError:
        return
    except Exception as error:  # for example a class that cannot be imported here
        return records.send(_failure(error))
    unsent: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_send_records, args=(records, unsent), daemon=True).start()
    while True:
        source, index, visit = indices.recv()
        try:
            record = read(datasets[source], index, visit)
            result = None if record is None else encode(record)
        except Exception as error:
            result = _failure(error)
        unsent.put(bytes(Pickler.dumps(result)))


def _send_records(records: Connection, unsent: SimpleQueue[bytes]) -> None:
    """Send records from a thread, so that the worker goes on reading while the pipe is full."""
    try:
        while True:
            records.send_bytes(unsent.get())
    except OSError:
        os._exit(0)  # the main process has closed its end


def _failure(error: Exception) -> Failure:
    """Return an exception in a form that can always be pickled."""
    is_user_error = isinstance(error, UserError)
    message = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return Failure(is_user_error, message, "".join(lines))
