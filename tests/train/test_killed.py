"""Endings at random moments lose nothing; ``python tests/helpers/killed.py FOLDER`` does more of it, in all stages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


@pytest.mark.slow
def test_runs_that_end_in_any_way_resume_to_the_same_weights(tmp_path):
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    words = [str(tmp_path), "--endings", "7", "--steps", "60", "--stages", "sft", "align"]
    done = subprocess.run(
        [sys.executable, str(HERE / "helpers" / "killed.py"), *words],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for line in done.stdout.splitlines():
        assert "7 of 7 endings met the run" in line
