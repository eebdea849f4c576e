"""LaProp on shards: FSDP2 over two processes on the CPU (sharded.py), one of which has empty shards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANKS, NO_GLOO = 2, 77  # processes, and the exit code of one that finds no other
HERE = Path(__file__).parent


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo",
)
def test_two_processes_train_one_model(tmp_path):
    """Steps, clipping by the norm of all shards, a bad gradient on one rank, checkpoints, and what is refused."""
    started = [
        subprocess.Popen(
            [sys.executable, str(HERE / "sharded.py"), str(rank), str(tmp_path)],
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if NO_GLOO in [process.returncode for process in started]:
        pytest.skip(f"gloo does not work here: {' / '.join(text.strip() for text in said)}")
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0, text
