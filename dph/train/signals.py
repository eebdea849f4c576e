"""SIGTERM and Ctrl-C as a question that a loop asks when it can stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def told_to_stop(say: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """A function that gives the number of the signal where SIGTERM or Ctrl-C has come, else 0.

    ``say`` is told of the first one when it comes. Ctrl-C after it stops at once; SIGTERM does not, as timeout(1) and
    batch systems send it to a process and once more to its group. Outside the main thread, where no handler can be
    set, none ever comes.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield int
        return

    def handle(number: int, _: Any) -> None:
        if not came:
            came.append(number)
            with contextlib.suppress(RuntimeError):  # stderr, met in the middle of a line, cannot be entered twice
                say(f"{signal.Signals(number).name}: the step is being finished and saved; Ctrl-C now stops at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
