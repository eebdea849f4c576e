"""Worker processes that read and encode records ahead of training, which takes them in the order that it gave.

    order = Readers(mixture(sources, seed=0), tokenizer, workers=2)     # an Order, of encoded records
    next(order)
    order.close()

The main process draws which records come; worker i of n reads and encodes every n-th of them. A state is that of what
was taken: what was read ahead is read again by whoever goes on from it, with any number of workers.
"""

import atexit
import contextlib
import multiprocessing
import signal
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, NamedTuple

from dph.chat import Encoded
from dph.data.formats import encoder
from dph.data.sampler import Drawn, Place
from dph.errors import UserError

AHEAD = 1024  # records that are read ahead at most, all workers together: an update's or two
BYTES = 64 << 20  # what these may take in the workers; a token takes 8
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # they reach the whole group of processes, and are the main one's to handle


class Failure(NamedTuple):
    """What a worker sends in place of a record: whether the error is the user's to mend, what it says, and where."""

    users: bool
    text: str
    where: str


@dataclass(frozen=True)
class Worker:
    """A process, and the main process's ends of both pipes; at the worker's end of one hangs the worker alone."""

    process: BaseProcess
    places: Connection
    records: Connection


class Readers:
    """Records of ``order``, encoded, in its order. The processes start when the first is asked for.

    Args:
        order: that goes ahead; from now on it is this object's.
        tokenizer: to encode with.
        workers: processes, at least 1. They ignore SIGINT and SIGTERM, and end with the main process, however it ends.

    Raises UserError where records or tokenizer cannot be sent to another process. As anywhere that starts processes, a
    script has to begin its work under ``if __name__ == "__main__":``.
    """

    def __init__(self, order: Drawn, tokenizer: Any, workers: int) -> None:
        self.order, self.run, self._count = order, order.run, workers
        self._material = _packed(order.lists, tokenizer)
        self._workers: list[Worker] = []
        self._ahead: deque[Place] = deque()
        self._turn = 0  # whose is the first of these
        self._taken = self._bytes = 0
        self.close = weakref.finalize(self, _end, self._workers)
        atexit.register(self.close)  # before multiprocessing's own, which waits for workers that still wait for us

    @property
    def size(self) -> int:
        """Records in one pass."""
        return self.order.size

    def __iter__(self) -> Iterator[Encoded | tuple[Encoded, Encoded] | None]:
        """Itself."""
        return self

    def __next__(self) -> Encoded | tuple[Encoded, Encoded] | None:
        """The next record. Raises what reading or encoding it raised, and RuntimeError where its worker is gone."""
        if not self._workers:
            self._start()
        self._go_ahead()
        if not self._ahead:
            raise StopIteration
        found = self._take()
        if isinstance(found, Failure):
            raise (UserError if found.users else RuntimeError)(found.text) from RuntimeError(found.where)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands by what was taken."""
        return self.order.state_dict(self._ahead)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand there; what was read ahead is dropped."""
        while self._ahead:
            self._take()
        self.order.load_state_dict(state)

    def _start(self) -> None:
        """Start the workers, deaf to signals from their first moment, and send them what they read from."""
        context = multiprocessing.get_context("forkserver")  # our own fork would copy the locks of PyTorch's threads
        context.set_forkserver_preload([__name__])  # imported once, and its memory shared
        resource_tracker.ensure_running()  # left to itself it starts with the first process, and lets signals in again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for _ in range(self._count):
                self._workers.append(_worker(context))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for worker in self._workers:
            with contextlib.suppress(BrokenPipeError):  # whoever waits for its records is told
                worker.places.send_bytes(self._material)
        self._material = b""

    def _go_ahead(self) -> None:
        """Hand out places, in turn, as far ahead as there is room for records of the size that came so far."""
        room = BYTES * self._taken // self._bytes if self._bytes else 0
        while len(self._ahead) < min(AHEAD, max(2 * self._count, room)):
            try:
                place = self.order.advance()
            except StopIteration:
                return
            worker = self._workers[(self._turn + len(self._ahead)) % self._count]
            with contextlib.suppress(BrokenPipeError):
                worker.places.send(place)
            self._ahead.append(place)

    def _take(self) -> Any:
        """The first of what was read ahead."""
        worker = self._workers[self._turn]
        try:
            message = worker.records.recv_bytes()
        except (EOFError, ConnectionResetError):
            worker.process.join(10)
            raise RuntimeError(
                f"data.workers: a process that reads records ended (exit code {worker.process.exitcode}); a negative "
                "code is the signal that killed it, 1 a start that failed, as of a script without if __name__ == ..."
            ) from None
        self._ahead.popleft()
        self._turn = (self._turn + 1) % self._count
        self._taken, self._bytes = self._taken + 1, self._bytes + len(message)
        return ForkingPickler.loads(message)


def _packed(lists: list[Sequence[Any]], tokenizer: Any) -> bytes:
    """What a worker needs, as bytes."""
    try:
        return bytes(ForkingPickler.dumps((lists, tokenizer)))
    except Exception as error:  # whatever the objects raise that do not want to be packed
        raise UserError(
            "data.workers: expected records and a tokenizer that can be sent to another process, got "
            f"{type(error).__name__}: {error}; data.workers=0 reads them in this one"
        ) from error


def _worker(context: BaseContext) -> Worker:
    """Start one. In a pipe there is room for the places of all that is read ahead (64 KB): handing out never waits."""
    theirs, places = context.Pipe(duplex=False)
    records, their_records = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, their_records), name="dph reader", daemon=True)
    process.start()
    theirs.close()
    their_records.close()
    return Worker(process, places, records)


def _end(workers: list[Worker]) -> None:
    """Nothing that a worker has is worth waiting for."""
    for worker in workers:
        worker.process.kill()
    for worker in workers:
        worker.process.join()
        worker.places.close()
        worker.records.close()
    workers.clear()


def _work(places: Connection, records: Connection) -> None:
    """A worker's life. Both pipes break when the main process closes its ends or dies, and then it is over."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # for a fork server that another started
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            lists, tokenizer = places.recv()
            encode = encoder(tokenizer)
        except EOFError:
            return
        except Exception as error:  # a class, say, that cannot be imported here
            return records.send(_failure(error))
        unsent: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=_send, args=(records, unsent), daemon=True).start()
        while True:
            which, index = places.recv()
            try:
                record = lists[which][index]
                found = None if record is None else encode(record)
            except Exception as error:
                found = _failure(error)
            unsent.put(bytes(ForkingPickler.dumps(found)))


def _send(records: Connection, unsent: SimpleQueue[bytes]) -> None:
    """In a thread of its own, so that the worker reads on while the pipe is full."""
    with contextlib.suppress(BrokenPipeError):
        while True:
            records.send_bytes(unsent.get())


def _failure(error: Exception) -> Failure:
    users = isinstance(error, UserError)
    text = str(error) if users else f"{type(error).__name__}: {error}"
    return Failure(users, text, "".join(traceback.format_exception(type(error), error, error.__traceback__)))
