"""Deferred handling of signals that end a run, so that a loop can stop between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
"""Signals of kill(1) and batch systems, of Ctrl-C, of a terminal that closes, and of a limit of processor time."""


@contextlib.contextmanager
def stop_signals(notify: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of the signal received, one of ``STOPPING``, or 0.

    ``notify`` gets a message when the first signal arrives. Ctrl-C after that raises KeyboardInterrupt at once; the
    others do not, since timeout(1) and batch systems send SIGTERM to a process and again to its group. SIGHUP that the
    process ignores, as under nohup(1), stays ignored. Outside the main thread, where Python allows no handlers, the
    function always returns 0.
    """
    received = 0
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal received
        if not received:
            received = number
            with contextlib.suppress(RuntimeError):  # stderr is not reentrant: the signal may interrupt a write to it
                notify(f"{signal.Signals(number).name}: the step is being finished and saved; Ctrl-C now stops at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    previous = {}
    for number in STOPPING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            previous[number] = signal.signal(number, handle)
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
