"""SIGTERM and Ctrl-C as a question that a loop asks when it can stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def told_to_stop() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM or Ctrl-C has come; a second Ctrl-C stops at once.

    Outside the main thread, where no handler can be set, it always says no.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return

    def handle(number: int, _: Any) -> None:
        if number == signal.SIGINT and came.is_set():
            raise KeyboardInterrupt
        came.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
