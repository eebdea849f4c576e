"""OpenMP's idle threads sleep, instead of spinning, while the process waits for CPUs."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dph import _openmp

ROOT = Path(__file__).resolve().parents[1]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def printed(code, **environment):
    """What a fresh interpreter prints."""
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


def watches():
    return [thread for thread in threading.enumerate() if isinstance(thread, _openmp.Watch)]


# Idle threads spin without end, so the CPU time of a sleep is theirs.
SPINNING = """
import os, time, torch
from dph import _openmp
torch.set_num_threads(len(os.sched_getaffinity(0)))
def idle():
    torch.zeros(torch.get_num_threads() * _openmp.GRAIN).add_(1)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    return time.process_time() - before
before = idle()
with _openmp.more_threads_than_cpus():
    held = idle()
print(before, held, idle())
"""


@linux
def test_idle_threads_sleep_while_there_are_more_than_cpus():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    for _ in range(
        3
    ):  # the threads that were held may take a while to end, on a busy machine longer than the script waits
        before, held, after = map(float, printed(SPINNING, GOMP_SPINCOUNT="1000000000000"))
        if held < min(0.02, before / 2, after / 2):
            return
    pytest.fail(f"expected sleep only while threads are held, got {before}, {held} and {after} s of CPU time")


WAITING = """
import os, subprocess, sys, time
from dph import _openmp
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
began, before, idle = time.monotonic(), _openmp.waited_seconds(), _openmp.idle_seconds()
while time.monotonic() - began < 0.5: pass
print(_openmp.waited_seconds() - before, _openmp.idle_seconds() - idle)
other.kill()
"""


@linux
def test_waiting_for_a_cpu_is_measured():
    waited, idle = map(float, printed(WAITING))
    assert waited > 0.1
    assert idle < 0.1


@linux
def test_one_watch_at_a_time(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    with _openmp.sleeping_when_contended(), _openmp.sleeping_when_contended():
        assert len(watches()) == 1
    assert not watches()
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    with _openmp.sleeping_when_contended():
        assert not watches()


def test_repeated_contention_prolongs_the_pauses(monkeypatch):
    contended, total, just_held, pauses = iter([0, 1, 1, 1, 0, 1]), 0, [], []
    watch = _openmp.Watch()

    def waited():
        nonlocal total
        if just_held:
            just_held.clear()
            return total
        try:
            total += next(contended)
        except StopIteration:
            watch._stopped.set()
        return total

    def hold(pause):
        just_held.append(True)
        pauses.append(pause)

    monkeypatch.setattr(_openmp, "INTERVAL", 0.001)
    monkeypatch.setattr(_openmp, "waited_seconds", waited)
    monkeypatch.setattr(_openmp, "more_threads_than_cpus", contextlib.nullcontext)
    monkeypatch.setattr(watch, "_wait_for_idle_cpus", hold)
    monkeypatch.setitem(sys.modules, "torch", None)
    watch.run()
    assert pauses == [1.0, 2.0, 4.0, 1.0]


@pytest.mark.parametrize(
    ("idle", "stopped", "waits"), [([0.0, 0.5], False, 1), ([0.0, 0.3, 0.3, 0.6, 0.6, 1.1], False, 3),
                                   ([0.0] * 99, False, 16), ([0.0] * 9, True, 1)],
)  # fmt: skip
def test_spinning_is_tried_when_cpus_are_idle_and_at_last_if_none_is(idle, stopped, waits, monkeypatch):
    seen, seconds = [], iter(idle)
    watch = _openmp.Watch()
    monkeypatch.setattr(_openmp, "idle_seconds", lambda: next(seconds))
    monkeypatch.setattr(watch._stopped, "wait", lambda pause: seen.append(pause) or stopped)
    watch._wait_for_idle_cpus(2.0)
    assert seen == [2.0] * waits
