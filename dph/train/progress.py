"""Figures of a run: means over the steps between two logged ones, and what the terminal shows of them."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = ("loss", "token_accuracy", "reward_accuracy", "grad_norm", "lr")


class Progress:
    """Steps done of ``total``, the time that is left, tokens per second and losses, on stderr.

    A line that stays at every logged step and every evaluation, and on a terminal a bar below them.
    """

    def __init__(self, name: str, total: int, first: int, quiet: bool = False) -> None:
        self.name, self.total, self.quiet = name, total, quiet
        self._first, self._began = first, time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            from dph.train.bar import Bar

            self._bar = Bar(name, total, first)

    def advance(self) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """The figures of a logged step, or of an evaluation."""
        text = ", ".join(f"{key} {value:.4g}" for key, value in values.items() if _shown(key))
        if "tokens_per_second" in values:
            text += f", {values['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in values:
            text += f", MFU {values['mfu']:.1%}"
        if "memory_gb" in values:
            text += f", {values['memory_gb']:.1f} GB"
        left = f", {self._left(step)} left" if step < self.total else ""
        self._print(f"{self.name} {step}/{self.total}: {text}{left}")

    def note(self, text: str) -> None:
        """One line of text."""
        self._print(f"{self.name}: {text}")

    def _print(self, line: str) -> None:
        """A line that stays, above the bar if there is one."""
        if self.quiet:
            return
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def _left(self, step: int) -> str:
        rate = (time.monotonic() - self._began) / max(1, step - self._first)
        hours, seconds = divmod(round(rate * (self.total - step)), 3600)
        return f"{hours}:{seconds // 60:02d}:{seconds % 60:02d}"

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _shown(key: str) -> bool:
    """The figures that matter most; of several held-out sources, only all together."""
    return key in SHOWN or (key.startswith("eval/") and key.count("/") == 1)


class Window:
    """Means over the steps since the last logged one; steps that were skipped are counted, and no more."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._sums = [0.0] * len(names)
        self._steps = self._tokens = self._all_tokens = self._skipped = 0
        self._lr = self._seconds = self._flops = 0.0

    def add(
        self, figures: Sequence[float], lr: float, tokens: int, flops: float, seconds: float, *, skipped: bool
    ) -> None:
        """One step's figures, as ``names`` has them, and the time that it took."""
        if not skipped:
            self._sums = [a + b for a, b in zip(self._sums, figures, strict=True)]
            self._steps += 1
        self._skipped, self._lr, self._seconds = self._skipped + skipped, lr, self._seconds + seconds
        self._tokens, self._all_tokens = self._tokens + tokens, self._all_tokens + tokens
        self._flops += flops

    def close(self) -> dict[str, float]:
        """The means, the rate, the speed and all that was skipped so far; then a new window begins."""
        values = {name: x / self._steps for name, x in zip(self.names, self._sums, strict=True) if self._steps}
        values |= {"lr": self._lr, "tokens": self._all_tokens, "skipped": self._skipped}
        seconds = max(self._seconds, 1e-9)
        values |= {"tokens_per_second": self._tokens / seconds, "seconds": self._seconds}
        values |= {"tflops_per_second": self._flops / seconds / 1e12}
        self._sums, self._steps, self._tokens = [0.0] * len(self.names), 0, 0
        self._seconds = self._flops = 0.0
        return values

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        sums = [None if math.isnan(x) else x for x in self._sums]  # a part that is off has NaN, which JSON has not
        counts = {"steps": self._steps, "tokens": self._tokens, "all_tokens": self._all_tokens}
        return {"sums": sums, **counts, "skipped": self._skipped, "seconds": self._seconds, "flops": self._flops}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state`` gave."""
        self._sums = [math.nan if x is None else x for x in state["sums"]]
        self._steps, self._tokens, self._all_tokens = state["steps"], state["tokens"], state["all_tokens"]
        self._skipped, self._seconds, self._flops = state["skipped"], state["seconds"], state["flops"]
