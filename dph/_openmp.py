"""Waiting of OpenMP's idle threads, on a machine that other processes use as well.

By default an idle thread spins until the others finish. If another process needs the core, the spinning delays the
thread that has work: beside five busy processes on two cores, the quickstart's alignment was 67 times slower, and 17
times if threads spin for a fraction of a millisecond. With threads that sleep at once it is 2 to 4 times slower there,
but takes a third longer on an idle machine. So threads spin, for a bounded time, and sleep at once while the process
waits for CPUs:

- ``bounded_spinning`` sets the bound while PyTorch (which loads OpenMP) is imported;
- ``sleeping_when_contended`` watches how long threads wait for a CPU, in training and in every command.

Neither changes a result. If ``OMP_WAIT_POLICY`` or ``GOMP_SPINCOUNT`` is set, both leave the waiting to the user.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

INTERVAL = 0.1  # seconds between measurements
CONTENDED = 0.4  # CPUs that this process waits for, in total over its threads, from which on they sleep
IDLE = 0.2  # CPUs, in total over those that this process may use, from which on threads try to spin again
PAUSES = (1.0, 4.0)  # seconds until then, at least: at first, and after repeated attempts
LONGEST = 32.0  # seconds after which they try it although no CPU was idle
MOST_TEAMS = 16
GRAIN = 32768  # elements per thread, below which PyTorch uses fewer threads
MEASURED = ("/proc/self/schedstat", "/proc/stat")


@contextlib.contextmanager
def bounded_spinning() -> Iterator[None]:
    """Set ``GOMP_SPINCOUNT`` within the context.

    GNU OpenMP reads the variable when it is loaded. It is removed afterwards: child processes do not inherit it.
    """
    if _configured():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "20000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]


@contextlib.contextmanager
def sleeping_when_contended() -> Iterator[None]:
    """Let OpenMP's idle threads sleep within the context while other processes need the CPUs. Contexts may be nested.

    Needs Linux, which measures the time that threads wait for a CPU.
    """
    if _configured() or Watch.active() or not all(map(os.path.exists, MEASURED)):
        yield
        return
    watch = Watch()
    watch.start()
    try:
        yield
    finally:
        watch.stop()


def _configured() -> bool:
    """Whether the user has configured how threads wait."""
    return not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}.isdisjoint(os.environ)


class Watch(threading.Thread):
    """Thread that measures contention while OpenMP's threads spin, and lets them sleep for a while if there is any."""

    def __init__(self) -> None:
        super().__init__(name="dph contention", daemon=True)
        self._stopped = threading.Event()

    @classmethod
    def active(cls) -> bool:
        """Whether one runs in this process."""
        return any(isinstance(thread, cls) for thread in threading.enumerate())

    def run(self) -> None:
        """Measure until :meth:`stop`; a machine on which that fails, or no thread can be started, is left as it is."""
        with contextlib.suppress(OSError, RuntimeError):
            self._watch()

    def _watch(self) -> None:
        pause, waited = PAUSES[0], waited_seconds()
        while not self._stopped.wait(INTERVAL):
            previous, waited = waited, waited_seconds()
            if waited - previous <= CONTENDED * INTERVAL:
                pause = PAUSES[0]
            elif "torch" in sys.modules:  # it loads OpenMP
                with more_threads_than_cpus():
                    self._wait_for_idle_cpus(pause)
                pause, waited = min(2 * pause, PAUSES[1]), waited_seconds()

    def _wait_for_idle_cpus(self, pause: float) -> None:
        """Return after ``pause`` seconds in which CPUs were idle, or after ``LONGEST``.

        Short attempts to spin are not free: threads that sleep most of the time come to share a CPU, where they hand
        over their work without waiting for other processes, and spinning threads move apart.
        """
        for _ in range(round(LONGEST / pause)):
            before = idle_seconds()
            if self._stopped.wait(pause) or idle_seconds() - before > IDLE * pause:
                return

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()
        self.join()


def waited_seconds() -> float:
    """Return how long the threads of this process have waited for a CPU so far, in total."""
    nanoseconds = 0
    for task in os.listdir("/proc/self/task"):
        # A thread may have ended meanwhile.
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/schedstat", "rb") as file:
            nanoseconds += int(file.read().split()[1])
    return nanoseconds / 1e9


def idle_seconds() -> float:
    """Return how long the CPUs that this process may use have been idle since the start of the system, in total."""
    names, ticks = {f"cpu{number}" for number in os.sched_getaffinity(0)}, 0
    with open("/proc/stat", encoding="ascii") as file:
        for line in file:
            name, *fields = line.split()
            if name in names:
                ticks += int(fields[3]) + int(fields[4])  # idle, and idle with input or output pending
    return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def more_threads_than_cpus() -> Iterator[None]:
    """Keep sleeping threads such that OpenMP has more than there are CPUs.

    GNU OpenMP documents that its idle threads then spin for 100 rounds only, also those of other teams. A team belongs
    to the thread that has started it: its own thread does not spin, and takes the team with it when it ends.
    """
    import torch

    threads, cpus = torch.get_num_threads(), len(os.sched_getaffinity(0))
    released, holders = threading.Event(), []
    teams = -(-(cpus - 1) // max(threads - 1, 1))
    if threads > 1 and teams <= MOST_TEAMS:
        holders = [threading.Thread(target=_hold_team, args=(threads, released), daemon=True) for _ in range(teams)]
    try:
        for holder in holders:
            holder.start()
        yield
    finally:
        released.set()
        for holder in holders:
            if holder.ident is not None:
                holder.join()


def _hold_team(threads: int, released: threading.Event) -> None:
    """Start a team of OpenMP threads, by any parallel operation, and keep it."""
    import torch

    torch.zeros(threads * GRAIN, dtype=torch.float32, device="cpu").add_(1)
    released.wait()
