"""Progress of a run on the terminal: metric lines, a progress bar, and the means of metrics between two lines."""

import contextlib
import errno
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm
from tqdm.utils import disp_len

from dph.errors import printable

SHOWN = ("loss", "token_accuracy", "reward_accuracy", "grad_norm", "lr")
MAX_COLUMNS = 80  # of the bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]"
# Formats without a bar, the longest first: a narrow terminal gets the first that fits.
TEXTS = ("{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]", "{desc}: {n_fmt}/{total_fmt}", "{n_fmt}/{total_fmt}")


class HarmlessStream:
    """Text stream that passes text on to ``stream`` until that fails, and drops the rest; None drops everything."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._works = stream, stream is not None

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        with self._giving_up():
            if self._works:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if it works."""
        with self._giving_up():
            if self._works:
                self._stream.flush()

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        """Give the stream up if it fails: a closed pipe, a full disk, a terminal that is gone, a closed file."""
        try:
            yield
        except UnicodeError:  # characters that this stream cannot encode
            pass
        except (OSError, ValueError):
            self._works = False

    def isatty(self) -> bool:
        """Return whether the stream works and is a terminal."""
        with self._giving_up():
            return self._works and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """Return the stream's descriptor. Raises OSError if it has none, or once it has failed."""
        if not self._works or not hasattr(self._stream, "fileno"):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._stream.fileno()

    def __getattr__(self, name: str) -> Any:
        """Return other attributes of the stream."""
        if name == "_stream":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self._stream, name)


@contextlib.contextmanager
def harmless_output() -> Iterator[None]:
    """Context in which nothing that is printed can fail: by progress, logging, warnings or a library."""
    replaced = {}
    for name in ("stdout", "stderr"):
        original = getattr(sys, name)
        replaced[name] = original, HarmlessStream(original)
        setattr(sys, name, replaced[name][1])
    try:
        yield
    finally:
        for name, (original, harmless) in replaced.items():
            if getattr(sys, name) is harmless:
                setattr(sys, name, original)


class Progress:
    """Completed steps of ``total``, remaining time, tokens per second and losses, on stderr.

    One line per logged step and evaluation, and on a terminal a progress bar below them.

    Args:
        name: prefix of the lines (the stage).
        total: steps of the run.
        first: steps completed before (a resumed run).
        quiet: print nothing.
    """

    def __init__(self, name: str, total: int, first: int, quiet: bool = False) -> None:
        self.name, self.total, self.quiet = name, total, quiet
        self._first, self._start_time = first, time.monotonic()
        self._bar = Bar(name, total, first) if not quiet and sys.stderr.isatty() else None

    def advance(self) -> None:
        """Count one step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Print the metrics of a logged step or of an evaluation."""
        shown = []
        for key, value in values.items():
            is_total = key.startswith("eval/") and key.count("/") == 1  # over all held-out sources
            if key in SHOWN or is_total:
                shown.append(f"{key} {value:.4g}")
        text = ", ".join(shown)
        if "tokens_per_second" in values:
            text += f", {values['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in values:
            text += f", MFU {values['mfu']:.1%}"
        if "memory_gb" in values:
            text += f", {values['memory_gb']:.1f} GB"
        if step < self.total:
            seconds_per_step = (time.monotonic() - self._start_time) / max(1, step - self._first)
            hours, seconds = divmod(round(seconds_per_step * (self.total - step)), 3600)
            text += f", {hours}:{seconds // 60:02d}:{seconds % 60:02d} left"
        self._print(f"{self.name} {step}/{self.total}: {text}")

    def note(self, text: str) -> None:
        """Print one line of text."""
        self._print(f"{self.name}: {text}")

    def _print(self, line: str) -> None:
        """Print a permanent line, above the bar if there is one."""
        if self.quiet:
            return
        line = printable(line, keep="")
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Stop the bar and leave it on the terminal."""
        if self._bar is not None:
            self._bar.close()


class Bar(tqdm):
    """Progress bar with stage, steps and times on stderr; a narrow terminal gets fewer elements, never a cut line."""

    def __init__(self, name: str, total: int, first: int) -> None:
        # A fixed size: on a terminal of 0 columns tqdm's own detection would draw nothing.
        super().__init__(desc=name, total=total, initial=first, file=sys.stderr, ncols=MAX_COLUMNS, nrows=20)

    def format_meter(self, n: float, total: float, elapsed: float, **details: Any) -> str:
        """Return the line, shorter than the terminal's current width."""
        details |= {"n": n, "total": total, "elapsed": elapsed}
        details["prefix"] = details["prefix"].removesuffix(": ")
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns  # 0 if the terminal does not report it
        except (OSError, ValueError):
            columns = 0
        available = min(columns - 1, MAX_COLUMNS) if columns else MAX_COLUMNS
        if columns:
            shortest_bar = tqdm.format_meter(**details | {"bar_format": BAR, "ncols": None})  # with a bar of 10 columns
            if disp_len(shortest_bar) <= available:
                return tqdm.format_meter(**details | {"bar_format": BAR, "ncols": available})
        for text in TEXTS:
            line = tqdm.format_meter(**details | {"bar_format": text, "ncols": None})
            if disp_len(line) <= available:
                return line
        return ""


class RunningMeans:
    """Means of metrics over the steps since the last logged one; skipped steps are only counted.

    Args:
        names: metrics of a step, in the order of ``add``'s ``values``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._sums = [0.0] * len(names)
        self._steps = self._tokens = self._all_tokens = self._skipped = 0
        self._lr = self._seconds = self._flops = 0.0

    def add(
        self, values: Sequence[float], lr: float, tokens: int, flops: float, seconds: float, *, skipped: bool
    ) -> None:
        """Add the metrics of one step (in the order of ``names``), and its tokens, FLOPs and duration."""
        if not skipped:
            self._sums = [total + value for total, value in zip(self._sums, values, strict=True)]
            self._steps += 1
        self._skipped += skipped
        self._lr = lr
        self._seconds += seconds
        self._tokens += tokens
        self._all_tokens += tokens
        self._flops += flops

    def flush(self) -> dict[str, float]:
        """Return means, learning rate, speed, and the totals of tokens and skipped steps; then restart the means."""
        values = {}
        if self._steps:
            for name, total in zip(self.names, self._sums, strict=True):
                values[name] = total / self._steps
        seconds = max(self._seconds, 1e-9)
        values |= {
            "lr": self._lr,
            "tokens": self._all_tokens,
            "skipped": self._skipped,
            "tokens_per_second": self._tokens / seconds,
            "seconds": self._seconds,
            "tflops_per_second": self._flops / seconds / 1e12,
        }
        self._sums = [0.0] * len(self.names)
        self._steps = self._tokens = 0
        self._seconds = self._flops = 0.0
        return values

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON; null stands for NaN (an unused term)."""
        return {
            "sums": [None if math.isnan(total) else total for total in self._sums],
            "steps": self._steps,
            "tokens": self._tokens,
            "all_tokens": self._all_tokens,
            "skipped": self._skipped,
            "seconds": self._seconds,
            "flops": self._flops,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self._sums = [math.nan if total is None else total for total in state["sums"]]
        self._steps, self._tokens, self._all_tokens = state["steps"], state["tokens"], state["all_tokens"]
        self._skipped, self._seconds, self._flops = state["skipped"], state["seconds"], state["flops"]
