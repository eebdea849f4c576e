"""Deferred handling of SIGTERM and Ctrl-C, so that a loop can stop between two steps."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def stop_signals(notify: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of the signal received (SIGTERM or SIGINT), or 0.

    ``notify`` gets a message when the first signal arrives. Ctrl-C after that raises KeyboardInterrupt at once; SIGTERM
    does not, since timeout(1) and batch systems send it to a process and again to its group. Outside the main thread,
    where Python allows no handlers, the function always returns 0.
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

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
