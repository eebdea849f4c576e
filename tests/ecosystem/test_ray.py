"""Ray: two workers on this machine, one of them killed while it writes; the result is that of one process."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.command_line import save_models
from helpers.texts import write_lines
from helpers.two import environment

pytest.importorskip("ray")
pytestmark = [pytest.mark.ecosystem, pytest.mark.slow]
TEXTS = ["a gripping film", "is the film watchable?", "positive or negative", "the"]


def started(*words):
    command = [sys.executable, "-m", "dph.cli", *map(str, words)]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def writers(folder):
    """The processes that have a temporary file of a shard open."""
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for file in Path("/proc", process, "fd").iterdir():
                if os.readlink(file).startswith(f"{folder}/.part"):
                    yield int(process)


@pytest.fixture
def folder(tmp_path):
    save_models(tmp_path)
    return tmp_path


def test_a_worker_is_killed(folder):
    prompts = [{"prompt": f"{text} {i}", "id": i} for i in range(12) for text in TEXTS]
    file = write_lines(folder / "in/prompts.jsonl", *prompts)
    words = ["generate", folder / "judge", "--file", file, "-n", 8, "--max-new-tokens", 60, "--seed", 3]
    expected = finished(started(*words, "--output", folder / "whole.jsonl"))

    output = folder / "shards"
    process = started(*words, "--output", output, "--ray", "local", "--workers", 2)
    killed = None
    while killed is None and process.poll() is None:
        if any(output.glob("part-*")):
            killed = next(writers(output), None)
        time.sleep(0.002)
    if killed is not None:
        os.kill(killed, signal.SIGKILL)
    assert finished(process) == expected
    assert killed is not None
    parts = sorted(output.glob("*.jsonl"))
    assert len(parts) > 1
    assert b"".join(part.read_bytes() for part in parts) == (folder / "whole.jsonl").read_bytes()
    assert {path.name for path in output.iterdir()} == {".command.json", *(part.name for part in parts)}
