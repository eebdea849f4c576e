"""The bar of a run on a terminal, apart so that tqdm is imported only where there is a terminal."""

import os
import sys
from typing import Any

from tqdm import tqdm
from tqdm.utils import disp_len

WIDEST = 80  # columns of the bar at most
# From the fullest on; of those without a bar the first that a narrow terminal has room for.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
TEXTS = ("{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]", "{desc}: {n_fmt}/{total_fmt}", "{n_fmt}/{total_fmt}")


class Bar(tqdm):
    """Stage, bar, steps and times on stderr. Where room lacks, whole parts are left out: nothing is cut or wraps."""

    def __init__(self, name: str, total: int, first: int) -> None:
        # Its own size, that tqdm does not ask for the terminal's: where that has 0 columns it would show nothing.
        super().__init__(desc=name, total=total, initial=first, file=sys.stderr, ncols=WIDEST, nrows=20)

    def format_meter(self, n: float, total: float, elapsed: float, **details: Any) -> str:
        """The line, of fewer columns than the terminal has now."""
        details |= {"n": n, "total": total, "elapsed": elapsed}
        details["prefix"] = details["prefix"].removesuffix(": ")
        columns = _columns()
        room = min(columns - 1, WIDEST) if columns else WIDEST

        def line(text: str, ncols: int | None = None) -> str:
            return tqdm.format_meter(**details | {"bar_format": text, "ncols": ncols})

        if columns and disp_len(line(BAR)) <= room:  # there the bar is at its least, of 10 columns
            return line(BAR, room)
        return next((found for text in TEXTS if disp_len(found := line(text)) <= room), "")


def _columns() -> int:
    """Of the terminal; 0 where it does not tell."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 0
