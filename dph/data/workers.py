"""Worker processes that read and encode records ahead of training, which receives them in the sampler's order.

    pool = WorkerPool(mixture(datasets, seed=0), tokenizer, workers=2)     # a Sampler of encoded records
    next(pool)
    pool.close()

The main process draws the indices; worker i of n reads and encodes every n-th record. The state is that of the records
received: prefetched records are read again by the run that continues from it, with any number of workers.
"""

import atexit
import contextlib
import multiprocessing
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, NamedTuple

from dph.chat import Encoded
from dph.data.formats import Encoder
from dph.data.sampler import IndexSampler, RecordIndex
from dph.errors import UserError

MAX_PREFETCHED = 1024  # records, over all workers: those of one or two steps
MAX_PREFETCHED_BYTES = 64 << 20  # of these records in the workers; a token takes 8
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # sent to the whole process group, and handled by the main process


class Failure(NamedTuple):
    """Exception of a worker, sent in place of a record: whether it is a UserError, its message, its traceback."""

    is_user_error: bool
    message: str
    traceback: str


@dataclass(frozen=True)
class Worker:
    """A process and the main process's ends of its two pipes; only the worker holds the other ends."""

    process: BaseProcess
    indices: Connection
    records: Connection


class WorkerPool:
    """Encoded records of ``sampler`` in its order. The processes start with the first record.

    Args:
        sampler: used by this object alone from now on.
        tokenizer: the encoder's tokenizer.
        workers: number of processes, at least 1. They ignore SIGINT and SIGTERM, and end with the main process in
            every case.

    Raises UserError if records or tokenizer cannot be pickled. As with all of multiprocessing, a script must start its
    work under ``if __name__ == "__main__":``.
    """

    def __init__(self, sampler: IndexSampler, tokenizer: Any, workers: int) -> None:
        self.sampler, self.run, self._count = sampler, sampler.run, workers
        try:
            self._initial_message = bytes(ForkingPickler.dumps((sampler.datasets, tokenizer)))
        except Exception as error:  # objects that cannot be pickled raise any kind of exception
            raise UserError(
                "data.workers: expected records and a tokenizer that can be sent to another process, got "
                f"{type(error).__name__}: {error}; data.workers=0 reads them in this one"
            ) from error
        self._workers: list[Worker] = []
        self._prefetched: deque[RecordIndex] = deque()  # sent to the workers, not yet received
        self._next_worker = 0  # which reads the first of these
        self._received = self._received_bytes = 0
        self.close = weakref.finalize(self, _stop, self._workers)
        # Run before multiprocessing's own handler, which waits for workers that still wait for the main process.
        atexit.register(self.close)

    @property
    def size(self) -> int:
        """Records in one pass."""
        return self.sampler.size

    @property
    def position(self) -> int:
        """Records received so far."""
        return self.sampler.position - len(self._prefetched)

    def __iter__(self) -> Iterator[Encoded | tuple[Encoded, Encoded] | None]:
        """Return the pool itself."""
        return self

    def __next__(self) -> Encoded | tuple[Encoded, Encoded] | None:
        """Return the next record.

        Raises UserError or RuntimeError if reading or encoding it failed, RuntimeError if its worker has ended.
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

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state after the records received."""
        return self.sampler.state_dict(self._prefetched)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; prefetched records are dropped."""
        while self._prefetched:
            self._receive()
        self.sampler.load_state_dict(state)

    def _start(self) -> None:
        """Start the workers with signals blocked from their first instruction, and send them records and tokenizer."""
        context = multiprocessing.get_context("forkserver")  # a plain fork would copy the locks of PyTorch's threads
        context.set_forkserver_preload([__name__])  # imported once, and its memory shared
        # Without this call the tracker starts with the first process, and unblocks the signals.
        resource_tracker.ensure_running()
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for _ in range(self._count):
                self._workers.append(_start_worker(context))
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
        try:
            message = worker.records.recv_bytes()
        except (EOFError, ConnectionResetError):
            worker.process.join(10)
            raise RuntimeError(
                f"data.workers: a process that reads records ended (exit code {worker.process.exitcode}); a negative "
                "code is the signal that killed it, 1 a start that failed, as of a script without if __name__ == ..."
            ) from None
        self._prefetched.popleft()
        self._next_worker = (self._next_worker + 1) % self._count
        self._received += 1
        self._received_bytes += len(message)
        return ForkingPickler.loads(message)


def _start_worker(context: BaseContext) -> Worker:
    """Start one process. Its pipe (64 KB) has room for the indices of all prefetched records: sending never blocks."""
    worker_indices, indices = context.Pipe(duplex=False)
    records, worker_records = context.Pipe(duplex=False)
    arguments = (worker_indices, worker_records)
    process = context.Process(target=_worker_loop, args=arguments, name="dph reader", daemon=True)
    process.start()
    worker_indices.close()
    worker_records.close()
    return Worker(process, indices, records)


def _stop(workers: list[Worker]) -> None:
    """Kill the processes: they hold nothing that has to be saved."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.indices.close()
        worker.records.close()
    workers.clear()


def _worker_loop(indices: Connection, records: Connection) -> None:
    """Read and encode records until a pipe breaks, which happens when the main process closes its ends or dies."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # in case another library started the fork server
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            datasets, tokenizer = indices.recv()
            encode = Encoder(tokenizer)
        except EOFError:
            return
        except Exception as error:  # for example a class that cannot be imported here
            return records.send(_failure(error))
        unsent: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=_send_records, args=(records, unsent), daemon=True).start()
        while True:
            source, index = indices.recv()
            try:
                record = datasets[source][index]
                result = None if record is None else encode(record)
            except Exception as error:
                result = _failure(error)
            unsent.put(bytes(ForkingPickler.dumps(result)))


def _send_records(records: Connection, unsent: SimpleQueue[bytes]) -> None:
    """Send records from a thread, so that the worker goes on reading while the pipe is full."""
    with contextlib.suppress(BrokenPipeError):
        while True:
            records.send_bytes(unsent.get())


def _failure(error: Exception) -> Failure:
    """Return an exception in a form that can always be pickled."""
    is_user_error = isinstance(error, UserError)
    message = str(error) if is_user_error else f"{type(error).__name__}: {error}"
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return Failure(is_user_error, message, "".join(lines))
