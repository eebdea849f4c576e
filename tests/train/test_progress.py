"""What a run shows while it trains: the same lines on a terminal of any width as in a pipe."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
import tty

import pytest

from dph.train.progress import Progress

FIGURES = {"loss": 1.85312, "reward_accuracy": 0.7688, "grad_norm": 12.34, "lr": 0.000123, "tokens_per_second": 54321}
BAR = re.compile(r"(align: +[0-9]+%\|.+\| |(align: )?)[0-9]+/1234( \[[0-9:]+<[0-9:?]+\])?")


def report():
    """One run's progress: two logged steps, an evaluation, a note."""
    progress = Progress("align", 1234, 0)
    for step in range(1, 1235):
        progress.advance()
        if step in (617, 1234):
            progress.show(step, FIGURES)
    progress.show(1234, {"eval/reward_accuracy": 0.7688})
    progress.note("the model is in runs/align")
    progress.close()


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of so many columns as stderr while a function runs; what it was sent."""

    def read(screen, parts):
        with contextlib.suppress(OSError):  # as Linux says that the other end is closed
            while part := os.read(screen, 1 << 16):
                parts.append(part)

    def run(columns, function):
        screen, end = pty.openpty()
        parts = []
        reader = threading.Thread(target=read, args=(screen, parts))  # a terminal holds 4 KB
        reader.start()
        tty.setraw(end)
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
        with open(end, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stderr)
            function()
        reader.join()
        os.close(screen)
        return b"".join(parts).decode()

    return run


@pytest.mark.parametrize("columns", [200, 80, 50, 20, 12, 0])
def test_lines_stay_above_a_bar_that_is_never_cut(columns, terminal, capsys):
    report()
    without_time = lambda line: re.sub(", [0-9:]+ left", "", line)  # noqa: E731
    piped = [without_time(line) for line in capsys.readouterr().err.splitlines()]
    assert len(piped) == 4
    assert piped[2] == "align 1234/1234: eval/reward_accuracy 0.7688"
    drawn = [line for line in re.split(r"[\r\n]+", terminal(columns, report)) if line.strip()]
    lines = [without_time(line) for line in drawn if without_time(line) in piped]
    assert lines == piped
    bars = [line.rstrip() for line in drawn if without_time(line) not in piped]
    assert bars
    for bar in bars:
        assert BAR.fullmatch(bar), bar
        assert len(bar) <= min(columns or 80, 80)
    assert ("|" in bars[-1]) == (columns >= 50)
