"""Bound on how long OpenMP's idle threads spin, set while PyTorch (which loads OpenMP) is imported.

By default an idle thread spins until the others finish. If another process needs the core, the spinning delays the
thread that has work: next to one busy process on two cores, training fell from 8,500 to 580 tokens/s. Spinning for a
fraction of a millisecond keeps most of the speed of an idle machine (18,300 of 19,500 tokens/s; without spinning:
14,200) and bounds that loss.
"""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def bounded_spinning() -> Iterator[None]:
    """Set ``GOMP_SPINCOUNT`` within the context, unless the user has configured how threads wait.

    GNU OpenMP reads the variable when it is loaded. It is removed afterwards: child processes do not inherit it.
    """
    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "20000"
    try:
        yield
    finally:
        del os.environ["GOMP_SPINCOUNT"]
