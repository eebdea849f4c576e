"""SIGKILL at random moments changes no weight; ``python tests/helpers/killed.py --kills 20 FOLDER`` does more of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_weights(tmp_path):
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(HERE / "helpers" / "killed.py"), "--kills", "3", "--steps", "60", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("3 of 3 kills met a run")
