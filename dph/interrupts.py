"""SIGTERM and Ctrl-C as a question that a loop asks when it can stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[], int]]:
    """A function that gives the number of the signal where SIGTERM or Ctrl-C has come, else 0.

    A second Ctrl-C stops at once. Outside the main thread, where no handler can be set, none ever comes.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield int
        return

    def handle(number: int, _: Any) -> None:
        if number == signal.SIGINT and came:
            raise KeyboardInterrupt
        came.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
